//go:build !linux

package linuxonly

var _ int = "vddkcp runs on Linux only: build it with GOOS=linux"
