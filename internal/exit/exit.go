// Package exit names the exit statuses of vddkcp. Scripts rely on them; the section "Exit
// status" of docs/cli.md describes them.
//
// Some types of errors have an exit status of their own. They have a method ExitStatus() int,
// which package transfer/report calls.
package exit

// These are the exit statuses of the command.
const (
	Failed     = 1  // the run failed, and no other status is more precise
	Usage      = 2  // the command line, the job file or a parameter is wrong
	Difference = 3  // two disks, or a disk and its digest, differ
	SomeJobs   = 4  // some jobs of a batch are done, others failed
	Left       = 5  // the copy is complete, but something that vddkcp made is still on the server
	Resumable  = 75 // the copy failed, and --resume can continue it
	// If a signal stopped the command, the exit status is Signal plus the number of the signal.
	Signal = 128
)
