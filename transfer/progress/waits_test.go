package progress

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c Counters
		wait := func(w Wait, d time.Duration) {
			c.Begin(w)
			time.Sleep(d)
			c.End(w)
		}
		if w, ok := c.Snapshot().Waits.Longest(); ok {
			t.Errorf("the longest wait of a copy that has not waited is %v, want none", w)
		}
		wait(WaitTarget, 3*time.Second)
		earlier := c.Snapshot().Waits
		wait(WaitTarget, time.Second)
		wait(WaitHostBudget, 2*time.Second)
		now := c.Snapshot().Waits
		if w, ok := now.Longest(); w != WaitTarget || !ok {
			t.Errorf("the longest wait is %v (%v), want target", w, ok)
		}
		if w, ok := now.Since(earlier).Longest(); w != WaitHostBudget || !ok {
			t.Errorf("the longest wait since the earlier values is %v (%v), want host budget", w, ok)
		}
	})
}

// TestReads counts the reads for which a copy waits when it is stopped.
func TestReads(t *testing.T) {
	var c Counters
	c.Begin(WaitSource)
	c.Begin(WaitSource)
	c.Begin(WaitRateLimit)
	c.Begin(WaitTarget)
	if n := c.Snapshot().Reads; n != 3 {
		t.Errorf("%d reads, want 3", n)
	}
	c.End(WaitSource)
	c.End(WaitRateLimit)
	if n := c.Snapshot().Reads; n != 1 {
		t.Errorf("%d reads after two have ended, want 1", n)
	}
}

func TestWaitNames(t *testing.T) {
	for w := range numWaits {
		if w.String() == "" {
			t.Errorf("wait %d has no name", w)
		}
	}
}

// step is a change of what the parts of a copy wait for, on the clock of TestWaitsDecide.
type step func(c *Counters)

// TestWaitsDecide checks for what a copy waits while its parts wait for several things.
func TestWaitsDecide(t *testing.T) {
	begin := func(w Wait, n int) step {
		return func(c *Counters) {
			for range n {
				c.Begin(w)
			}
		}
	}
	finished := func(n int) step {
		return func(c *Counters) {
			for range n {
				c.Finished()
			}
		}
	}
	collecting := func(by Wait) step { return func(c *Counters) { c.Collecting(by) } }
	background := func(w Wait) step { return func(c *Counters) { c.Background(w) } }
	for name, test := range map[string]struct {
		steps []step
		want  Wait
	}{
		"nothing":                     {nil, none},
		"reads":                       {[]step{begin(WaitSource, 4), begin(WaitEncoders, 2), begin(WaitTarget, 3)}, WaitSource},
		"as many reads as writes":     {[]step{begin(WaitSource, 2), begin(WaitTarget, 2)}, WaitSource},
		"finished pieces":             {[]step{begin(WaitSource, 2), finished(3), collecting(WaitTarget)}, WaitTarget},
		"the collector waits":         {[]step{begin(WaitSource, 1), finished(3)}, WaitSource},
		"the collector has continued": {[]step{begin(WaitSource, 1), finished(3), collecting(WaitTarget), (*Counters).Collected}, WaitSource},
		"the collector hashes":        {[]step{begin(WaitSource, 1), finished(3), collecting(WaitEncoders)}, WaitEncoders},
		"the collector has ended":     {[]step{background(WaitSource), finished(3), collecting(WaitTarget), (*Counters).DropFinished}, WaitSource},
		"one part at the limit":       {[]step{begin(WaitSource, 4), begin(WaitRateLimit, 1)}, WaitRateLimit},
		"limit and budget":            {[]step{begin(WaitHostBudget, 1), begin(WaitRateLimit, 4)}, WaitHostBudget},
		"background":                  {[]step{background(WaitSource), background(WaitTarget)}, WaitTarget},
		"no background":               {[]step{background(WaitTarget), begin(WaitSource, 1)}, WaitSource},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := new(Counters)
				for _, s := range test.steps {
					s(c)
				}
				time.Sleep(time.Second)
				var want Waits
				if test.want != none {
					want[test.want] = time.Second
				}
				if got := c.Snapshot().Waits; got != want {
					t.Errorf("the copy has waited %v, want %v", got, want)
				}
			})
		})
	}
}

// BenchmarkBegin measures the cost of one wait of one part of a copy.
func BenchmarkBegin(b *testing.B) {
	c := new(Counters)
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			c.Begin(WaitSource)
			c.End(WaitSource)
		}
	})
}
