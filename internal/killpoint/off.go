//go:build !killpoints

// Package killpoint lets tests kill the process with SIGKILL at a named point, as a
// loss of power would. The points exist only in builds with the tag killpoints.
package killpoint

import "time"

// At marks a point at which tests may kill the process. It does nothing in builds
// without the tag killpoints.
func At(string) {}

// Interval returns the time between checkpoints that tests ask for, or 0 for the
// default.
func Interval() time.Duration { return 0 }
