package nfctest

import (
	"bytes"
	"sync"

	"github.com/klauspost/compress/zlib"

	"github.com/vddkcp/vddkcp/internal/zero"
)

// run is a range of bytes.
type run struct{ from, to int }

// findRuns finds the runs of data that SkipZ sends, and returns the size of the SkipZ form.
// A run begins and ends with a byte that is not zero.
func (w *worker) findRuns(data []byte) int {
	const page, block = 4096, 512
	w.runs = w.runs[:0]
	size, open := 8, false
	for at := 0; at < len(data); {
		step := min(block, len(data)-at)
		if at%page == 0 && len(data)-at >= page && zero.Is(data[at:at+page]) {
			step = page
		} else if !zero.Is(data[at : at+step]) {
			if !open {
				w.runs = append(w.runs, run{from: at})
			}
			w.runs[len(w.runs)-1].to = at + step
			open = true
			at += step
			continue
		}
		open = false
		at += step
	}
	for i := range w.runs {
		r := &w.runs[i]
		for data[r.from] == 0 {
			r.from++
		}
		for data[r.to-1] == 0 {
			r.to--
		}
		size += 8 + r.to - r.from
	}
	return size
}

// skipZ returns a fragment with data in its SkipZ form, after findRuns. The head is not filled in.
func (w *worker) skipZ(data []byte) []byte {
	b := w.room(len(data))
	b = le.AppendUint32(b, uint32(len(data)))
	b = le.AppendUint32(b, 0)
	for _, r := range w.runs {
		b = le.AppendUint32(b, uint32(r.from))
		b = le.AppendUint32(b, uint32(r.to-r.from))
		b = append(b, data[r.from:r.to]...)
	}
	return b
}

// room returns the buffer for a fragment with n bytes of compressed data. It is as long as the head.
func (w *worker) room(n int) []byte {
	if cap(w.out) < fragmentHead+n {
		w.out = make([]byte, 0, fragmentHead+n)
	}
	return w.out[:fragmentHead]
}

// packer is a zlib stream that is written to a buffer of a fixed size.
type packer struct {
	z    *zlib.Writer
	b    []byte
	full bool
}

func (p *packer) Write(b []byte) (int, error) {
	if p.full = p.full || len(p.b)+len(b) > cap(p.b); !p.full {
		p.b = append(p.b, b...)
	}
	return len(b), nil
}

// pack returns a fragment with data as a zlib stream; nil: the stream is not shorter than data.
// The head is not filled in.
func (w *worker) pack(data []byte) []byte {
	p := &w.zlib
	n := fragmentHead + len(data) - 1
	p.b, p.full = w.room(len(data))[:fragmentHead:n], false
	if p.z == nil {
		p.z, _ = zlib.NewWriterLevel(p, zlib.BestSpeed)
	} else {
		p.z.Reset(p)
	}
	p.z.Write(data)
	p.z.Close()
	if p.full {
		return nil
	}
	return p.b
}

// zlibZeros returns a zlib stream of n zeros.
func zlibZeros(n int64) []byte {
	var b bytes.Buffer
	z, _ := zlib.NewWriterLevel(&b, zlib.BestSpeed)
	zeros := make([]byte, min(n, 1<<20))
	for n > 0 {
		m := min(n, int64(len(zeros)))
		z.Write(zeros[:m])
		n -= m
	}
	z.Close()
	return b.Bytes()
}

// bomb returns a zlib stream of 16 MiB of zeros.
var bomb = sync.OnceValue(func() []byte { return zlibZeros(16 << 20) })
