//go:build !killpoints

// Package killpoint lets tests kill the process with SIGKILL, or stop it for some time, at named
// points of its code. The tests check what happens if the process ends, gets a signal or is overtaken
// by something else at such a point. The points exist only in builds with the build tag killpoints.
package killpoint

import "time"

// At is a point at which tests may kill or stop the process. It does nothing here, because the build has
// no tag killpoints.
func At(string) {}

// Interval returns the time between two checkpoints of a copy that a test has chosen. Without the
// build tag killpoints it always returns 0, which stands for the default interval.
func Interval() time.Duration { return 0 }

// Poll returns the time between two looks at a task of a server that a test has chosen. Without the
// build tag killpoints it always returns 0, which stands for the default time.
func Poll() time.Duration { return 0 }

// Watch returns the time between two looks at a VM that a test has chosen, while the disks of the VM
// are copied. Without the build tag killpoints it always returns 0, which stands for the default time.
func Watch() time.Duration { return 0 }
