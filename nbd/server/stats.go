package server

import (
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
)

// The constant operations is the length of the array in the field Stats.operations. An
// index in this array is the number of an NBD command. CmdBlockStatus is the highest of
// these numbers.
const operations = int(nbd.CmdBlockStatus) + 1

// sizeClasses is the number of classes in Operation.Sizes: up to 512 bytes, up to 1 KiB,
// and so on up to 32 MiB, and one class for longer requests.
const sizeClasses = 18

// Stats counts the requests of a server. It is safe for concurrent use. The zero value is
// ready to use.
type Stats struct {
	operations [operations]struct {
		count, failed, bytes, nanoseconds atomic.Int64
		sizes                             [sizeClasses]atomic.Int64
	}
}

// Operation holds the counters of one kind of request.
type Operation struct {
	Name    string        `json:"name"` // read, write, flush, trim, cache, write zeroes, block status
	Count   int64         `json:"count"`
	Failed  int64         `json:"failed"`     // requests among Count that failed or got no reply
	Bytes   int64         `json:"bytes"`      // sum of the lengths of all requests, in bytes
	Time    time.Duration `json:"time_ns"`    // sum of the times from receiving a request to sending its reply
	Average time.Duration `json:"average_ns"` // Time divided by Count
	// Sizes counts the requests by their length. Classes without requests are omitted.
	Sizes []SizeClass `json:"sizes"`
}

// SizeClass counts requests of similar length: they are longer than UpTo/2 bytes and
// have at most UpTo bytes. The class with UpTo 512 also counts all shorter requests. In
// the class of the longest requests UpTo is 0.
type SizeClass struct {
	UpTo  int64 `json:"up_to"` // bytes; 0: longer than 32 MiB
	Count int64 `json:"count"` // requests
}

// The method add counts one request with the given length in bytes.
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

// sizeClass returns the index, in Operation.Sizes, of the class for requests of the
// given length in bytes.
func sizeClass(length uint32) int {
	if length <= 512 {
		return 0
	}
	return min(bits.Len32(length-1)-9, sizeClasses-1)
}

// Snapshot returns the current counters. It leaves out kinds of requests that were
// never received. The result is sorted by the numbers of the NBD commands.
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
