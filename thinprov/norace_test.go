//go:build !race

package thinprov_test

const raceEnabled = false
