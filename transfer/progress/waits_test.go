package progress

import (
	"testing"
	"time"
)

func TestWaits(t *testing.T) {
	var c Counters
	if w, ok := c.Snapshot().Waits.Longest(); ok {
		t.Errorf("the longest wait of a copy that has not waited is %v, want none", w)
	}
	c.AddWait(WaitTarget, 3*time.Second)
	earlier := c.Snapshot().Waits
	c.AddWait(WaitTarget, time.Second)
	c.AddWait(WaitHostBudget, 2*time.Second)
	now := c.Snapshot().Waits
	if w, ok := now.Longest(); w != WaitTarget || !ok {
		t.Errorf("the longest wait is %v (%v), want target", w, ok)
	}
	if w, ok := now.Since(earlier).Longest(); w != WaitHostBudget || !ok {
		t.Errorf("the longest wait since the earlier values is %v (%v), want host budget", w, ok)
	}
}

func TestWaitNames(t *testing.T) {
	for w := range numWaits {
		if w.String() == "" {
			t.Errorf("wait %d has no name", w)
		}
	}
}
