package server

import (
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
)

func TestStats(t *testing.T) {
	var s Stats
	if got := s.Snapshot(); len(got) != 0 {
		t.Errorf("before the first: %+v", got)
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			s.add(nbd.CmdRead, 512, 2*time.Millisecond, false)
			s.add(nbd.CmdRead, 513, 4*time.Millisecond, true)
			s.add(nbd.CmdFlush, 0, time.Second, false)
			s.add(nbd.CmdTrim, 1<<32-1, time.Second, false)
			s.add(nbd.CmdWrite, 32<<20, time.Second, false)
			s.add(99, 1, time.Second, true)
		})
	}
	all.Wait()
	want := []Operation{
		{"read", 8, 4, 4 * 1025, 24 * time.Millisecond, 3 * time.Millisecond, []SizeClass{{512, 4}, {1024, 4}}},
		{"write", 4, 0, 128 << 20, 4 * time.Second, time.Second, []SizeClass{{32 << 20, 4}}},
		{"flush", 4, 0, 0, 4 * time.Second, time.Second, []SizeClass{{512, 4}}},
		{"trim", 4, 0, 4 * (1<<32 - 1), 4 * time.Second, time.Second, []SizeClass{{0, 4}}},
	}
	if got := s.Snapshot(); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
}
