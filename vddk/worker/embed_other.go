//go:build !amd64

package worker

import "embed"

// embedded is empty, because the worker program and VDDK exist only for x86-64. The folder bin may
// hold the program all the same, if vddkcp is built for several architectures.
var embedded embed.FS
