package transfer

import (
	"bytes"
	"fmt"
	"testing"
)

func TestScan(t *testing.T) {
	for _, c := range []struct {
		content      string // one character for each byte; 0 is a zero byte
		off          int64
		block, least int64
		want         string
	}{
		{"", 0, 4, 4, ""},
		{"aaaabbbb", 0, 4, 4, "data 0-8"},
		{"00000000", 0, 4, 4, "zero 0-8"},
		{"aaaa0000bbbb", 0, 4, 4, "data 0-4, zero 4-8, data 8-12"},
		{"aaaa000b0000", 0, 4, 4, "data 0-8, zero 8-12"},
		{"aaaa0000bbbb", 0, 4, 8, "data 0-12"},                                 // fewer zeros than least
		{"aaaa00000000bbbb", 0, 4, 8, "data 0-4, zero 4-12, data 12-16"},       // exactly least zeros
		{"0000bbbb", 0, 4, 8, "zero 0-4, data 4-8"},                            // the zeros may continue before the buffer
		{"aaaa0000", 0, 4, 8, "data 0-4, zero 4-8"},                            // the zeros may continue after the buffer
		{"aa0000bbbb00", 2, 4, 4, "data 0-2, zero 2-6, data 6-10, zero 10-12"}, // blocks begin at multiples of their size in the disk
		{"aaaa000", 0, 4, 4, "data 0-4, zero 4-7"},                             // a short last block
	} {
		b := bytes.ReplaceAll([]byte(c.content), []byte("0"), []byte{0})
		got := ""
		for i, r := range scan(nil, b, c.off, c.block, c.least) {
			if i > 0 {
				got += ", "
			}
			got += fmt.Sprintf("%s %d-%d", map[bool]string{false: "data", true: "zero"}[r.zero], r.start, r.end)
		}
		if got != c.want {
			t.Errorf("%q at %d, blocks of %d, least %d: %s; want %s", c.content, c.off, c.block, c.least, got, c.want)
		}
	}
}

func BenchmarkScan(b *testing.B) {
	buf := make([]byte, 1<<20)
	for _, percent := range []int{0, 50, 100} {
		b.Run(fmt.Sprintf("data=%d%%", percent), func(b *testing.B) {
			for i := range buf {
				buf[i] = 0
				if i>>14%2 == 0 && percent > 0 || percent == 100 {
					buf[i] = byte(i) | 1
				}
			}
			var runs []run
			b.SetBytes(int64(len(buf)))
			b.ReportAllocs()
			for b.Loop() {
				runs = scan(runs[:0], buf, 0, 4096, 4096)
			}
		})
	}
}
