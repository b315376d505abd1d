package worker

import "embed"

// embedded contains the folder bin. If make has built the worker program, the program is in this
// folder. Otherwise the folder has only a README, so that go build can embed it all the same.
//
//go:embed bin/*
var embedded embed.FS
