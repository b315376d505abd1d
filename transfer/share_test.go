package transfer_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// filed is a disk whose bytes also lie in a file, at the positions that at returns.
type filed struct {
	*sourcetest.Memory
	file *os.File
	at   func(off int64) (pos, n int64, ok bool)
}

func (d filed) InFile(off int64) (*os.File, int64, int64, bool) {
	pos, n, ok := d.at(off)
	return d.file, pos, n, ok
}

// cloner is a sink.Cloner in memory. It copies the ranges that it should share, and
// logs them.
type cloner struct {
	sink.Disk
	unit   int64
	refuse func(off int64) error // nil: never
	clones *[]string
}

func (c cloner) ZeroedFrom(int64) bool { return true }

func (c cloner) CloneUnit(*os.File) int64 { return c.unit }

func (c cloner) CloneFrom(f *os.File, pos, off, n int64) error {
	if pos%c.unit != 0 || off%c.unit != 0 || n%c.unit != 0 || n == 0 {
		return fmt.Errorf("share %d bytes at %d from %d: not in units of %d", n, off, pos, c.unit)
	}
	if c.refuse != nil {
		if err := c.refuse(off); err != nil {
			return err
		}
	}
	p := make([]byte, n)
	if _, err := f.ReadAt(p, pos); err != nil {
		return err
	}
	*c.clones = append(*c.clones, fmt.Sprintf("%d-%d", off, off+n))
	_, err := c.WriteAt(p, off)
	return err
}

const k = int64(1024)

// makeFiled returns a disk of 3 MiB and 700 bytes with two extents of data and two
// holes. Data lies in the file at its offset plus shift, except the range [2560 KiB,
// 2816 KiB).
func makeFiled(t *testing.T, shift int64) filed {
	t.Helper()
	size := 3072*k + 700
	m := sourcetest.Pattern(size,
		source.Extent{Off: 0, Len: 700, Kind: source.Zero},
		source.Extent{Off: 700, Len: 1024*k + 300},
		source.Extent{Off: 1024*k + 1000, Len: 1024*k - 1000, Kind: source.Zero},
		source.Extent{Off: 2048 * k, Len: 1024*k + 700},
	)
	whole := make([]byte, size)
	if _, err := m.ReadAt(whole, 0); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, append(make([]byte, shift), whole...), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return filed{m, f, func(off int64) (int64, int64, bool) {
		switch { // ranges in the file are at most 640 KiB long
		case off >= 2560*k && off < 2816*k:
			return 0, 0, false
		case off < 2560*k:
			return off + shift, min(640*k-off%(640*k), 2560*k-off), true
		}
		return off + shift, size - off, true
	}}
}

// shareCase is a case of TestShare.
type shareCase struct {
	name   string
	shift  int64 // of the data in the file, in bytes
	how    transfer.Reflink
	o      transfer.Options
	refuse func(off int64) error // error of CloneFrom
	clones string                // ranges in KiB that are shared
	err    string                // part of the error; "": none
}

func TestShare(t *testing.T) {
	for _, c := range []shareCase{
		{name: "auto", how: transfer.ReflinkAuto, clones: "4-640 640-1024 2048-2560 2816-3072"},
		{name: "auto, by the block", shift: 8 * k, how: transfer.ReflinkAuto, clones: "4-640 640-1024 2048-2560 2816-3072"},
		{name: "auto, at odd places", shift: 512, how: transfer.ReflinkAuto},
		{name: "never", how: transfer.ReflinkNever},
		{name: "with a digest", how: transfer.ReflinkAuto, o: transfer.Options{Digest: digest.SHA256}, clones: "4-640 640-1024 2048-2560 2816-3072"},
		{name: "with a digest, in small requests", how: transfer.ReflinkAuto, o: transfer.Options{Digest: digest.SHA256, RequestSize: 320 << 10},
			clones: "4-320 320-640 640-960 960-1024 2048-2240 2240-2560 2816-2880 2880-3072"},
		{name: "refused in the midst", how: transfer.ReflinkAuto, refuse: func(off int64) error {
			if off == 2048*k {
				return fmt.Errorf("not here: %w", errors.ErrUnsupported)
			}
			return nil
		}, clones: "4-640 640-1024 2816-3072"},
		{name: "refused, in small requests", how: transfer.ReflinkAuto, o: transfer.Options{RequestSize: 64 << 10}, refuse: func(off int64) error {
			return fmt.Errorf("not here: %w", errors.ErrUnsupported)
		}},
		{name: "refused in the midst, with a digest", how: transfer.ReflinkAuto, o: transfer.Options{Digest: digest.SHA256}, refuse: func(off int64) error {
			return fmt.Errorf("not here: %w", errors.ErrUnsupported)
		}},
		{name: "failed", how: transfer.ReflinkAuto, refuse: func(int64) error { return errBoom }, err: "boom"},
		{name: "always, and refused", how: transfer.ReflinkAlways, refuse: func(int64) error { return errors.ErrUnsupported }, err: "unsupported"},
		{name: "always, and some is in no file", how: transfer.ReflinkAlways, err: "no file holds the data at offset 2621440"},
		{name: "always, at odd places", shift: 512, how: transfer.ReflinkAlways, err: "the data at offset 700 of the disk is at offset 1212 of the file"},
	} {
		t.Run(c.name, c.run)
	}
}

// run makes the copy of a case and checks the content of the target.
func (c shareCase) run(t *testing.T) {
	src := makeFiled(t, c.shift)
	if c.name == "always, and refused" {
		src.at = func(off int64) (int64, int64, bool) { return off, src.Size() - off, true }
	}
	want := make([]byte, src.Size())
	if _, err := src.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	p := plan(t, src)
	shared, err := transfer.Shared(t.Context(), src, p, c.how, func(*os.File) int64 { return 4096 })
	if strings.Contains(c.err, "data at offset") {
		if !errors.Is(err, transfer.ErrNotShared) || !strings.Contains(err.Error(), c.err) {
			t.Errorf("Shared: %v", err)
		}
	} else if err != nil && c.err == "" {
		t.Error(err)
	}
	var clones []string
	dst := &sinktest.Memory{}
	c.o.Reflink, c.o.Counters = c.how, new(progress.Counters)
	result, err := transfer.Copy(t.Context(), src, cloner{create(t, dst, src.Size(), sink.Options{}), 4096, c.refuse, &clones}, p, c.o)
	if c.err != "" {
		if err == nil || !strings.Contains(err.Error(), c.err) {
			t.Fatalf("error %v, want %q", err, c.err)
		}
		if _, ok := dst.Published(); ok {
			t.Error("published")
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := dst.Published(); !bytes.Equal(got, want) {
		t.Error("content differs")
	}
	c.checkCounts(t, p, shared, clones, want, result)
}

// checkCounts checks the ranges that were shared, the counters, and the digest.
func (c shareCase) checkCounts(t *testing.T, p *transfer.Plan, shared int64, clones []string, want []byte, result transfer.Result) {
	var ranges []string
	bytesCloned := int64(0)
	for _, s := range clones {
		var from, to int64
		fmt.Sscanf(s, "%d-%d", &from, &to)
		ranges = append(ranges, fmt.Sprintf("%d-%d", from/k, to/k))
		bytesCloned += to - from
	}
	if got := strings.Join(ranges, " "); got != c.clones {
		t.Errorf("shared %s, want %s", got, c.clones)
	}
	s := c.o.Counters.Snapshot()
	if s.Cloned != bytesCloned || c.refuse == nil && shared != bytesCloned {
		t.Errorf("counted %d bytes shared and foresaw %d, %d were", s.Cloned, shared, bytesCloned)
	}
	if s.Done != p.Data || s.Planned != p.Data {
		t.Errorf("%d of %d bytes done, planned were %d", s.Done, s.Planned, p.Data)
	}
	if c.o.Digest == "" && s.Read != p.Data-bytesCloned {
		t.Errorf("read %d bytes, of %d that are not shared", s.Read, p.Data-bytesCloned)
	}
	if c.o.Digest != "" {
		if want := fmt.Sprintf("%x", sha256.Sum256(want)); result.Digest == nil || result.Digest.Value != want || s.Read != p.Data {
			t.Errorf("digest %v, want %s; read %d of %d bytes", result.Digest, want, s.Read, p.Data)
		}
	}
}

// TestShareShortRuns checks that short ranges, such as grains of a sparse image, are not
// shared with ReflinkAuto, because that costs more than it saves.
func TestShareShortRuns(t *testing.T) {
	src := makeFiled(t, 0)
	src.at = func(off int64) (int64, int64, bool) { return off, 16*k - off%(16*k), true }
	p := plan(t, src)
	unit := func(*os.File) int64 { return 4096 }
	if n, err := transfer.Shared(t.Context(), src, p, transfer.ReflinkAuto, unit); n != 0 || err != nil {
		t.Errorf("auto: %d bytes, %v", n, err)
	}
	if n, err := transfer.Shared(t.Context(), src, p, transfer.ReflinkAlways, unit); n != 2044*k || err != nil {
		t.Errorf("always: %d bytes, %v", n, err)
	}
	if _, err := transfer.Shared(t.Context(), src.Memory, p, transfer.ReflinkAlways, unit); !errors.Is(err, transfer.ErrNotShared) {
		t.Errorf("a source without a file: %v", err)
	}
	if _, err := transfer.Shared(t.Context(), src, p, transfer.ReflinkAlways, nil); !errors.Is(err, transfer.ErrNotShared) {
		t.Errorf("a target that can't: %v", err)
	}
	none := func(*os.File) int64 { return 0 }
	if _, err := transfer.Shared(t.Context(), src, p, transfer.ReflinkAlways, none); !errors.Is(err, transfer.ErrNotShared) || !strings.Contains(err.Error(), src.file.Name()) {
		t.Errorf("another file system: %v", err)
	}
}
