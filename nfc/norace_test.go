//go:build !race

package nfc_test

const patience = 1
