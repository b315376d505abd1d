package batch_test

import (
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/transfer/batch"
)

func TestEstimate(t *testing.T) {
	const mib, second = 1 << 20, time.Second
	for _, c := range []struct {
		name    string
		jobs    []string // NAME HOST SERVER, each of 100 MiB
		each    batch.Expected
		limits  batch.Limits
		reached batch.Reached
		want    time.Duration
		binds   string
	}{
		{name: "alone", jobs: []string{"a", "b", "c", "d"}, want: 100 * second, binds: "each disk's own rate binds it"},
		{name: "total", jobs: []string{"a", "b", "c", "d"}, limits: batch.Limits{Total: 1}, want: 400 * second, binds: "limits.total, 1 disks at once, binds it"},
		{name: "per host", jobs: []string{"a h", "b h", "c h", "d i"}, limits: batch.Limits{PerHost: 1}, want: 300 * second, binds: "h's limits.per_host, 1 disks at once, binds it"},
		{name: "per server", jobs: []string{"a h s", "b i s", "c j s"}, limits: batch.Limits{PerServer: 1, PerHost: 2}, want: 300 * second, binds: "s's limits.per_server, 1 disks at once, binds it"},
		{name: "rate", jobs: []string{"a", "b", "c", "d"}, limits: batch.Limits{Rate: 2 * mib}, want: 200 * second, binds: "limits.rate, 2.0 MiB/s, binds it"},
		// 32 MiB are 8 connections of 4 MiB: two copies with 4 each.
		{name: "fixed connections", jobs: []string{"a h", "b h", "c h", "d h"}, each: batch.Expected{Connections: 4, Fixed: true, Buffers: 4 * mib},
			want: 200 * second, binds: "h's limits.nfc_buffer, 32.0 MiB, binds it"},
		// Or two each, at half the rate.
		{name: "connections that adapt", jobs: []string{"a h", "b h", "c h", "d h"}, each: batch.Expected{Connections: 4, Buffers: 4 * mib},
			want: 200 * second, binds: "h's limits.nfc_buffer, 32.0 MiB, binds it"},
		{name: "room for all", jobs: []string{"a h", "b h"}, each: batch.Expected{Connections: 4, Buffers: 4 * mib}, want: 100 * second, binds: "each disk's own rate binds it"},
		{name: "less than one has room", jobs: []string{"a h", "b h"}, each: batch.Expected{Connections: 1, Buffers: 4 * mib}, limits: batch.Limits{NFCBuffer: mib},
			want: 200 * second, binds: "h's limits.nfc_buffer, 1.0 MiB, binds it"},
		{name: "few connections", jobs: []string{"a h", "b h"}, each: batch.Expected{Connections: 2, Buffers: mib}, limits: batch.Limits{Connections: 2},
			want: 200 * second, binds: "h's limits.connections, 2, binds it"},
		{name: "a server's budget", jobs: []string{"a - s", "b - s"}, each: batch.Expected{Connections: 2, Buffers: mib}, limits: batch.Limits{Connections: 2},
			want: 200 * second, binds: "s's limits.connections, 2, binds it"},
		{name: "hosts have their own", jobs: []string{"a h", "b i"}, each: batch.Expected{Connections: 2, Buffers: mib}, limits: batch.Limits{Connections: 2}, want: 100 * second, binds: "each disk's own rate binds it"},
		{name: "a slow host", jobs: []string{"a h", "b h", "c i"}, reached: batch.Reached{ByHost: map[string]float64{"host h": mib / 2}},
			want: 400 * second, binds: "what h gives to several disks at once, 512.0 KiB/s, binds it"},
		{name: "a slow disk here", jobs: []string{"a", "b"}, reached: batch.Reached{ByHost: map[string]float64{"": mib}}, want: 200 * second, binds: "what this machine gives to several disks at once, 1.0 MiB/s, binds it"},
		{name: "a slow network", jobs: []string{"a h", "b i"}, reached: batch.Reached{All: mib}, limits: batch.Limits{Rate: 2 * mib}, want: 200 * second, binds: "what all hosts together give this machine, 1.0 MiB/s, binds it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(t, strings.ReplaceAll(jobsOf(c.jobs...), `"host":"-",`, "")) // no host, but a server
			var all []batch.Expected
			for _, j := range f.file.Jobs {
				e := c.each
				e.Job, e.Bytes, e.Size, e.Rate = j, 100*mib, -1, mib
				all = append(all, e)
			}
			e := batch.Estimate(all, c.limits, c.reached)
			if e.Time.Round(second) != c.want || e.Binds != c.binds || e.Last == nil {
				t.Errorf("%s, %s; want %s, %s", e.Time, e.Binds, c.want, c.binds)
			}
		})
	}
	f := newFake(t, jobsOf("a h", "b h"))
	e := batch.Expected{Job: f.file.Jobs[0], Bytes: mib, Rate: mib, Connections: 4, Buffers: 4 * mib}
	other := e
	other.Job, other.Fixed = f.file.Jobs[1], true
	if got := batch.Opening([]batch.Expected{e, other}, batch.Limits{NFCBuffer: 8 * mib}); len(got) != 1 || got[0].Job != e.Job || got[0].Rate != mib/4 {
		t.Errorf("begins with %+v", got)
	}
	if e := batch.Estimate(nil, batch.Limits{}, batch.Reached{}); e.Last != nil {
		t.Errorf("of nothing: %+v", e)
	}
}

// TestEstimateNamesTheLast checks that the estimate names the job that ends last, if
// jobs start in the order in which Run starts them.
func TestEstimateNamesTheLast(t *testing.T) {
	f := newFake(t, jobsOf("a", "b", "c"))
	all := func(size bool) (all []batch.Expected) {
		for i, j := range f.file.Jobs {
			e := batch.Expected{Job: j, Bytes: int64(i+1) << 20, Size: -1, Rate: 1 << 20}
			if size {
				e.Size = e.Bytes
			}
			all = append(all, e)
		}
		return all
	}
	for _, c := range []struct {
		sizes         bool
		opening, last string
		want          time.Duration
	}{{false, "ab", "c", 4 * time.Second}, {true, "cb", "a", 3 * time.Second}} {
		limits := batch.Limits{Total: 2}
		opening := ""
		for _, j := range batch.Opening(all(c.sizes), limits) {
			opening += j.Job.Name
		}
		if e := batch.Estimate(all(c.sizes), limits, batch.Reached{}); opening != c.opening || e.Last.Name != c.last || e.Time != c.want {
			t.Errorf("sizes %v: begins with %s, %+v", c.sizes, opening, e)
		}
	}
}
