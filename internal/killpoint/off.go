//go:build !killpoints

// Package killpoint lets tests end the process at a named point, by SIGKILL, as
// a power cut would. Only builds with the tag killpoints have such points.
package killpoint

import "time"

// At is a point. Here it is nothing.
func At(string) {}

// Interval is how often checkpoints are taken; 0: as ever.
func Interval() time.Duration { return 0 }
