package progress

import (
	"fmt"
	"time"
)

// A sample is what a copy had done at one time.
type sample struct {
	at          time.Time
	moved, done int64 // Snapshot.Moved and Snapshot.Done
	waits       Waits
}

// recent computes the rate of a copy, and what it waits for, over the last ten seconds. A pause of
// the copy shows soon, and a burst does not raise the rate too much.
type recent struct {
	samples [11]sample // one for each second
	n       int        // number of samples in use
}

// A pace says how fast a copy was in the last ten seconds, and what it waited for.
type pace struct {
	rate  float64 // bytes per second that were really processed
	done  float64 // bytes of Snapshot.Done per second
	bound string  // what limits the copy, such as "source, 3 connections"; "": not known
}

// add records a Snapshot, and the time when it was taken. It may be called as often as the caller
// wants.
func (r *recent) add(now time.Time, s Snapshot) pace {
	newest := sample{now, s.Moved(), s.Done, s.Waits}
	// Timers are not exact, so a sample a little too early counts as one second later.
	if r.n == 0 || now.Sub(r.samples[r.n-1].at) >= 950*time.Millisecond {
		if r.n == len(r.samples) {
			copy(r.samples[:], r.samples[1:])
			r.n--
		}
		r.samples[r.n] = newest
		r.n++
	}
	oldest := r.samples[0]
	elapsed := now.Sub(oldest.at)
	if elapsed <= 0 {
		return pace{}
	}
	return pace{
		rate:  max(0, float64(newest.moved-oldest.moved)/elapsed.Seconds()),
		done:  max(0, float64(newest.done-oldest.done)/elapsed.Seconds()),
		bound: boundBy(newest.waits.Since(oldest.waits), elapsed, s.Connections),
	}
}

// boundBy returns what limits a copy that has spent the given waits during a time, or "" if it has
// hardly waited for anything.
func boundBy(w Waits, during time.Duration, connections int) string {
	longest, ok := w.Longest()
	if !ok || w[longest] < during/10 {
		return ""
	}
	text := longest.String()
	if longest != WaitSource && longest != WaitHostBudget {
		return text
	}
	switch {
	case connections == 1:
		text += ", 1 connection"
	case connections > 1:
		text += fmt.Sprintf(", %d connections", connections)
	}
	return text
}

// LongestETA is the longest remaining time that is shown, in seconds: over three years. A copy
// with a longer time makes no progress. An upper limit is needed because a time.Duration cannot
// hold more than 292 years.
const LongestETA = 1e8

// timeLeft estimates the remaining time of a copy, in seconds. If that is not possible, it
// returns nil.
func timeLeft(s Snapshot, p pace) *float64 {
	if p.done <= 0 || s.Planned < s.Done {
		return nil
	}
	seconds := float64(s.Planned-s.Done) / p.done
	return &seconds
}

// left returns the remaining time of a copy as text, or "" if it is not known or over.
func left(s Snapshot, p pace) string {
	eta := timeLeft(s, p)
	if eta == nil || *eta <= 0 || *eta >= LongestETA {
		return ""
	}
	return short(time.Duration(*eta) * time.Second)
}

// short returns a duration as text, such as "45s", "1m20s" or "3h5m".
func short(d time.Duration) string {
	switch d = d.Truncate(time.Second); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
}
