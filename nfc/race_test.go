//go:build race

package nfc_test

// patience is the factor by which the race detector makes time limits of tests longer.
const patience = 4
