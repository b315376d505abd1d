//go:build !killpoints

// Package killpoint lets tests kill the process with SIGKILL at named points of its code. The tests
// check what happens if the process stops at such a point. The points exist only in builds with the
// build tag killpoints.
package killpoint

import "time"

// At is a point at which tests may kill the process. It does nothing here, because the build has
// no tag killpoints.
func At(string) {}

// Interval returns the time between two checkpoints of a copy that a test has chosen. Without the
// build tag killpoints it always returns 0, which stands for the default interval.
func Interval() time.Duration { return 0 }
