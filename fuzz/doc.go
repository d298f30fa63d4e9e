// Package fuzz holds the fuzz targets of everything that decodes foreign bytes.
// Crashers that were found lie under testdata/fuzz, so that plain go test replays
// them; make fuzz visits each target for FUZZTIME.
package fuzz
