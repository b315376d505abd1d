package server

import (
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
)

// operations are the kinds of requests that are counted.
const operations = int(nbd.CmdBlockStatus) + 1

// sizeClasses are the classes of Operation.Sizes: up to 512 bytes, 1 KiB, and so
// on up to 32 MiB, and more.
const sizeClasses = 18

// Stats counts requests. It is safe for concurrent use; the zero value has
// counted nothing.
type Stats struct {
	operations [operations]struct {
		count, failed, bytes, nanoseconds atomic.Int64
		sizes                             [sizeClasses]atomic.Int64
	}
}

// Operation is what was counted of one kind of requests.
type Operation struct {
	Name    string        `json:"name"` // read, write, flush, trim, cache, write zeroes, block status
	Count   int64         `json:"count"`
	Failed  int64         `json:"failed"`  // of Count
	Bytes   int64         `json:"bytes"`   // that were asked for
	Time    time.Duration `json:"time_ns"` // from the request's arrival to its reply's sending, added up
	Average time.Duration `json:"average_ns"`
	// Sizes counts by length; classes without any are left out.
	Sizes []SizeClass `json:"sizes"`
}

// SizeClass is how many requests had a length above half of UpTo, and up to it.
type SizeClass struct {
	UpTo  int64 `json:"up_to"` // bytes; 0: more than 32 MiB. The first class is 512 with all below
	Count int64 `json:"count"`
}

func (s *Stats) add(c nbd.Command, length uint32, took time.Duration, failed bool) {
	if int(c) >= operations {
		return
	}
	o := &s.operations[c]
	o.count.Add(1)
	o.bytes.Add(int64(length))
	o.nanoseconds.Add(int64(took))
	if failed {
		o.failed.Add(1)
	}
	o.sizes[sizeClass(length)].Add(1)
}

func sizeClass(length uint32) int {
	if length <= 512 {
		return 0
	}
	return min(bits.Len32(length-1)-9, sizeClasses-1)
}

// Snapshot returns what was counted until now, of the kinds that there were.
func (s *Stats) Snapshot() []Operation {
	var all []Operation
	for c := range s.operations {
		o := &s.operations[c]
		n := o.count.Load()
		if n == 0 {
			continue
		}
		op := Operation{
			Name: nbd.Command(c).String(), Count: n, Failed: o.failed.Load(),
			Bytes: o.bytes.Load(), Time: time.Duration(o.nanoseconds.Load()),
		}
		op.Average = op.Time / time.Duration(n)
		for i := range o.sizes {
			if n := o.sizes[i].Load(); n > 0 {
				class := SizeClass{int64(512) << i, n}
				if i == sizeClasses-1 {
					class.UpTo = 0
				}
				op.Sizes = append(op.Sizes, class)
			}
		}
		all = append(all, op)
	}
	return all
}
