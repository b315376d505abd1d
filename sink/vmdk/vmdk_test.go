package vmdk

import (
	"bytes"
	"compress/zlib"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source"
)

// The header and the footer, field by field, as vSphere wants them; see "Virtual
// Disk Format 5.0", Hosted Sparse Extent Header.
func TestHeader(t *testing.T) {
	var m sinktest.Memory
	out, err := m.Create(t.Context(), sink.UnknownSize, sink.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := Create(t.Context(), out, "x.vmdk", 100<<20+512, Options{})
	if err == nil {
		_, err = d.WriteAt([]byte(strings.Repeat("sector", 256)[:512]), 100<<20)
	}
	if err := errors.Join(err, d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
		t.Fatal(err)
	}
	image, _ := m.Published()
	if len(image)%512 != 0 {
		t.Fatalf("%d bytes are no whole sectors", len(image))
	}
	// From the end: the end-of-stream marker, the footer, its marker, the grain
	// directory of one sector.
	end := len(image)
	footer := image[end-1024 : end-512]
	for name, b := range map[string][]byte{"header": image, "footer": footer} {
		directory := uint64(math.MaxUint64)
		if name == "footer" {
			directory = uint64(end/512 - 4)
		}
		for _, field := range []struct {
			name      string
			at, bytes int
			want      uint64
		}{
			{"magicNumber", 0, 4, 0x564d444b}, {"version", 4, 4, 3}, {"flags", 8, 4, 0x30001},
			{"capacity", 12, 8, 204801}, {"grainSize", 20, 8, 128},
			{"descriptorOffset", 28, 8, 1}, {"descriptorSize", 36, 8, 20},
			{"numGTEsPerGT", 44, 4, 512}, {"rgdOffset", 48, 8, 0}, {"gdOffset", 56, 8, directory}, {"overHead", 64, 8, 128},
			{"uncleanShutdown", 72, 1, 0}, {"line ends", 73, 4, 0x0a0d200a}, {"compressAlgorithm", 77, 2, 1},
		} {
			var value [8]byte
			copy(value[:], b[field.at:field.at+field.bytes])
			if got := binary.LittleEndian.Uint64(value[:]); got != field.want {
				t.Errorf("%s of the %s: %#x, want %#x", field.name, name, got, field.want)
			}
		}
	}
	if !zero.Is(image[end-512:]) {
		t.Error("no end-of-stream marker")
	}
}

func TestCreateRefuses(t *testing.T) {
	for _, c := range []struct {
		size int64
		o    Options
		want string
	}{
		{0, Options{}, "0 bytes"},
		{-512, Options{}, "-512 bytes"},
		{sink.UnknownSize, Options{}, "--size"},
		{513, Options{}, "a multiple of 512 bytes"},
		{MaxSize + 512, Options{}, "64 TiB"},
		{512, Options{Level: 10}, "level 10"},
		{512, Options{Level: -1}, "level -1"},
		{512, Options{Options: sink.Options{State: []byte("x")}}, "cannot be resumed"},
		{512, Options{Options: sink.Options{Backing: source.Disk(nil), Resume: 512}}, "cannot be resumed"},
	} {
		var m sinktest.Memory
		out, err := m.Create(t.Context(), sink.UnknownSize, sink.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if d, err := Create(t.Context(), out, "x.vmdk", c.size, c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%d %+v: %v, %v; want %q", c.size, c.o, d, err, c.want)
		}
		if !m.Ended() || len(m.Leftovers()) > 0 {
			t.Errorf("%d %+v: the file is left", c.size, c.o)
		}
	}
	// A file that is begun can't be ended where its size was known before.
	var m sinktest.Memory
	out, err := m.Create(t.Context(), 4096, sink.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := Create(t.Context(), out, "x.vmdk", 512, Options{})
	if err == nil {
		err = d.Finish(t.Context())
	}
	if err == nil {
		t.Error("a file of a fixed size: no error")
	}
	out.Abort()
}

// The file's sector numbers have 32 bits. Grains and tables that lie further are
// refused, and the grain directory may.
func TestFileEndsAt2TiB(t *testing.T) {
	const last = (1 << 32) - 1 // the last sector that a table can name
	for _, c := range []struct {
		name   string
		at     int64 // sector of the next byte
		grains int
		fails  bool
	}{
		{"a grain at the end", last, 1, true}, // its table is past it
		{"a table at the end", last - 2, 1, false},
		{"a table past the end", last - 1, 1, true},
		{"a grain past the end", last + 1, 1, true},
		{"a directory past the end", last + 100, 0, false},
	} {
		d, err := create(t.Context(), raw.Null(t.Context(), sink.UnknownSize), "x.vmdk", 1<<30, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.file.flush(); err != nil {
			t.Fatal(err)
		}
		d.file.pos = c.at * sectorSize
		for g := range c.grains {
			err = errors.Join(err, d.Place(int64(g)*grainSize, []byte("x"), false))
		}
		err = errors.Join(err, d.Finish(t.Context()))
		if (err != nil) != c.fails || c.fails && (!strings.Contains(err.Error(), "x.vmdk: ") || !strings.Contains(err.Error(), "2 TiB")) {
			t.Errorf("%s: %v", c.name, err)
		}
		d.Abort()
	}
}

// An error of any single write of the file is an error of the disk, and nothing
// is published.
func TestEachWriteFails(t *testing.T) {
	boom := errors.New("boom")
	content := make([]byte, 3*grainSize)
	for i := range content {
		content[i] = byte(i * i >> 7)
	}
	writes := 0
	run := func(fail int) (*sinktest.Memory, error) {
		m, n := new(sinktest.Memory), 0
		m.Before = func(_ context.Context, c sinktest.Call) error {
			if c.Op == sinktest.OpWrite {
				if n++; n == fail {
					return boom
				}
			}
			return nil
		}
		out, err := m.Create(t.Context(), sink.UnknownSize, sink.Options{})
		if err != nil {
			t.Fatal(err)
		}
		d, err := create(t.Context(), out, "x.vmdk", 100<<20, Options{})
		if err != nil {
			t.Fatal(err)
		}
		d.file.buf = append(make([]byte, 0, max(4096, len(d.file.buf)+1)), d.file.buf...)
		defer d.Abort()
		for _, off := range []int64{0, 40 << 20, 96 << 20} {
			if _, err := d.WriteAt(content, off); err != nil {
				return m, err
			}
		}
		if err := d.Finish(t.Context()); err != nil {
			if err := d.Publish(t.Context()); err == nil {
				t.Error("published after a Finish that failed")
			}
			return m, err
		}
		writes = n
		return m, d.Publish(t.Context())
	}
	if _, err := run(0); err != nil || writes < 2 {
		t.Fatalf("%d writes, %v", writes, err)
	}
	for fail := 1; fail <= writes; fail++ {
		m, err := run(fail)
		if _, published := m.Published(); !errors.Is(err, boom) || published || len(m.Leftovers()) > 0 || len(m.Violations()) > 0 {
			t.Errorf("write %d of %d fails: %v, published %v, left %q, %q", fail, writes, err, published, m.Leftovers(), m.Violations())
		}
	}
}

func TestPlaceRefuses(t *testing.T) {
	for _, c := range []struct {
		off   int64
		enc   []byte
		plain bool
	}{
		{2 * grainSize, nil, false},
		{2 * grainSize, make([]byte, maxPacked+1), false},
		{2 * grainSize, make([]byte, grainSize), true},
		{2*grainSize + 512, []byte("x"), false},
		{1 << 30, []byte("x"), false},
		{-grainSize, []byte("x"), false},
		{grainSize, []byte("x"), false}, // below what was written
	} {
		d, err := create(t.Context(), raw.Null(t.Context(), sink.UnknownSize), "x.vmdk", 1<<30, Options{})
		if err == nil {
			err = d.ZeroAt(t.Context(), 0, 2*grainSize)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Place(c.off, c.enc, c.plain); err == nil {
			t.Errorf("Place(%d, %d bytes, %v): no error", c.off, len(c.enc), c.plain)
		}
		if err := d.Finish(t.Context()); err == nil {
			t.Error("Finish after a Place that failed: no error")
		}
	}
}

// TestEncode checks that incompressible data grows by little, and that encoding
// allocates nothing once the buffers have their final size.
func TestEncode(t *testing.T) {
	for level := MinLevel; level <= MaxLevel; level++ {
		e := newEncoding(level)
		unit := make([]byte, grainSize)
		state := uint32(1)
		for i := range unit {
			state = state*1664525 + 1013904223
			unit[i] = byte(state >> 24)
		}
		enc, plain, err := e.Encode([]byte("before"), unit, 0)
		if err != nil || plain || string(enc[:6]) != "before" || len(enc) > 6+grainSize+64 {
			t.Errorf("level %d: %d bytes, plain %v, %v", level, len(enc), plain, err)
		}
		if _, _, err := e.Encode(nil, make([]byte, grainSize+1), 0); err == nil {
			t.Errorf("level %d: a unit that is too long: no error", level)
		}
		if level > DefaultLevel {
			continue
		}
		if n := testing.AllocsPerRun(10, func() { enc, _, _ = e.Encode(enc[:0], unit, 0) }); n != 0 {
			t.Errorf("level %d: %v allocations for a grain", level, n)
		}
	}
}

// The end of a disk is a whole grain, whatever the encoding had before.
func TestEncodeFillsUp(t *testing.T) {
	e := newEncoding(DefaultLevel)
	for _, unit := range []string{strings.Repeat("before", 1000), "last"} {
		enc, _, err := e.Encode(nil, []byte(unit), 0)
		if err != nil {
			t.Fatal(err)
		}
		r, err := zlib.NewReader(bytes.NewReader(enc))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if want := unit + strings.Repeat("\x00", grainSize-len(unit)); err != nil || string(got) != want {
			t.Errorf("%d bytes, %v; want %d bytes and zeros up to %d", len(got), err, len(unit), grainSize)
		}
	}
}

func TestPlaceAllocatesNothing(t *testing.T) {
	d, err := create(t.Context(), raw.Null(t.Context(), sink.UnknownSize), "x.vmdk", MaxSize, Options{})
	if err != nil {
		t.Fatal(err)
	}
	enc, off := make([]byte, 20000), int64(0)
	if n := testing.AllocsPerRun(2000, func() {
		if err := d.Place(off, enc, false); err != nil {
			t.Fatal(err)
		}
		off += 3 * grainSize
	}); n != 0 {
		t.Errorf("%v allocations for a grain", n)
	}
}
