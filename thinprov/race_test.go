//go:build race

package thinprov_test

const raceEnabled = true
