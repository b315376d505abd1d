package qcow2

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
)

// file is a file in memory that keeps what was asked of it.
type file struct {
	content []byte
	writes  []string
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	f.writes = append(f.writes, fmt.Sprintf("%d+%d", off, len(p)))
	if n := int(off) + len(p); n > len(f.content) {
		f.content = append(f.content, make([]byte, n-len(f.content))...)
	}
	return copy(f.content[off:], p), nil
}

func TestRun(t *testing.T) {
	f := new(file)
	r := run{file: f, size: 16 << 10, start: 4096}
	want := make([]byte, 4096)
	add := func(b byte, n int) {
		t.Helper()
		p := bytes.Repeat([]byte{b}, n)
		if err := r.add(p); err != nil {
			t.Fatal(err)
		}
		want = append(want, p...)
	}
	patch := func(b byte, off, n int) {
		t.Helper()
		p := bytes.Repeat([]byte{b}, n)
		if err := r.patch(p, int64(off)); err != nil {
			t.Fatal(err)
		}
		copy(want[off:], p)
	}
	add(1, 6000)
	add(2, 6000)
	patch(3, 4096, 1000) // in memory
	add(4, 1000)         // to 17096, over the border
	patch(5, 16000, 500) // on both sides of it
	patch(6, 4100, 10)   // in the file
	if err := r.addZeros(20480); err != nil {
		t.Fatal(err)
	}
	want = append(want, make([]byte, 20480-len(want))...)
	add(7, 12000) // written without copying, except the last part of a page
	if r.end() != int64(len(want)) {
		t.Errorf("the run ends at %d, want %d", r.end(), len(want))
	}
	if err := r.flush(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(f.content, want) {
		t.Error("the file has another content")
	}
	if want := []string{"4096+12288", "16000+384", "4100+10", "16384+4096", "20480+8192", "28672+3808"}; !slices.Equal(f.writes, want) {
		t.Errorf("writes %v, want %v", f.writes, want)
	}
}
