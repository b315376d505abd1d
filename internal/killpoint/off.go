//go:build !killpoints

// Package killpoint lets tests kill the process with SIGKILL at named points of its code. The tests
// check what happens if the process stops at such a point. The points exist only in builds with the
// build tag killpoints.
package killpoint

import "time"

// At is a point at which tests may kill the process. It does nothing here, because the build has
// no tag killpoints.
func At(string) {}

// Interval returns how often tests want a checkpoint of a copy. It returns 0 for the default
// interval.
func Interval() time.Duration { return 0 }
