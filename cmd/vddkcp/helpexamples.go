package main

import "github.com/vddkcp/vddkcp/cmd/vddkcp/internal/manual"

// helpExamples are the examples at the end of the help of each command, and in its manual page. A test
// runs each of them.
var helpExamples = []manual.Example{
	{Command: "copy", About: "Copy a VMDK to a qcow2 image.", Line: "vddkcp web01.vmdk web01.qcow2"},
}

// exitStatuses are the exit statuses of vddkcp, for the help and the manual. docs/cli.md has them too.
var exitStatuses = []manual.Status{
	{Status: "0", Meaning: "done, and durable"},
	{Status: "1", Meaning: "failed, and cannot be resumed"},
	{Status: "2", Meaning: "wrong use: a bad flag, job file, configuration file or parameter"},
	{Status: "3", Meaning: "two disks, or a disk and its digest, differ", Commands: []string{"copy", "run", "verify", "vm"}},
	{Status: "4", Meaning: "some jobs of a batch failed, and the others are done", Commands: []string{"run"}},
	{Status: "5", Meaning: "done, but a snapshot that vddkcp made is still on the server", Commands: []string{"check", "copy", "run", "vm"}},
	{Status: "75", Meaning: "failed for a reason that may pass; --resume can continue", Commands: []string{"check", "copy", "run", "verify", "vm"}},
	{Status: "129, 130, 143", Meaning: "stopped by SIGHUP, SIGINT or SIGTERM"},
}
