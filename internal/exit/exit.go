// Package exit names the exit statuses of vddkcp. The section "Exit status" of
// docs/cli.md is their contract with scripts.
//
// An error type that stands for one of them has a method ExitStatus() int, which
// package transfer/report reads.
package exit

// These are the exit statuses.
const (
	Failed     = 1 // the run failed, and no other status says more
	Usage      = 2 // the command line, the job file or a parameter is wrong
	Difference = 3 // two disks, or a disk and its digest, differ
	SomeJobs   = 4 // some jobs of a batch are done, others failed
	Resumable  = 75
	// Signal is added to the number of a signal for the exit status of a run that this
	// signal stopped.
	Signal = 128
)
