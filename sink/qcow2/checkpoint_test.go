package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// memory is a backing in memory.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(m).ReadAt(p, off) }
func (m memory) Size() int64                             { return int64(len(m)) }
func (m memory) Close() error                            { return nil }
func (m memory) Extents(_ context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return source.WholeData(off, length)
}

// writer gives a disk the content that it is to have, in calls of any kind.
type writer struct {
	d        sink.Disk
	o        Options
	content  []byte
	r        *rand.Rand
	encoding sink.Encoding
}

func newWriter(d sink.Disk, o Options, content []byte, r *rand.Rand) *writer {
	w := &writer{d: d, o: o, content: content, r: r}
	if e, ok := d.(sink.Encoder); ok {
		w.encoding = e.NewEncoding()
	}
	return w
}

// step makes one call that begins at off, and returns where it ended.
func (w *writer) step(off int64) (int64, error) {
	unit := w.d.Unit()
	end := min(off+(1+int64(w.r.IntN(12)))*unit, int64(len(w.content)))
	p := w.content[off:end]
	one := w.content[off:min(off+unit, end)]
	switch {
	case zero.Is(one):
		for end = off + int64(len(one)); end < int64(len(w.content)); end += int64(len(one)) {
			if one = w.content[end:min(end+unit, int64(len(w.content)))]; !zero.Is(one) {
				break
			}
		}
		return end, w.d.ZeroAt(context.Background(), off, end-off)
	case w.o.Backing != nil && w.r.IntN(2) == 0:
		same := make([]byte, len(one))
		w.o.Backing.ReadAt(same, off)
		if bytes.Equal(same, one) {
			return off + int64(len(one)), w.d.SameAt(context.Background(), off, int64(len(one)))
		}
	case w.encoding != nil && w.r.IntN(4) > 0:
		code, plain, err := w.encoding.Encode(nil, one, off)
		if plain {
			code = one
		}
		switch {
		case err != nil:
		case len(code) == 0:
			err = w.d.SameAt(context.Background(), off, int64(len(one)))
		default:
			err = w.d.(sink.Encoder).Place(off, code, plain)
		}
		return off + int64(len(one)), err
	}
	_, err := w.d.WriteAt(p, off)
	return end, err
}

// taken is a checkpoint.
type taken struct {
	off   int64
	state []byte
}

// A copy that is killed goes on from its last checkpoint or the one before,
// again and again, each time with whatever was written after that.
func TestKilledAndResumed(t *testing.T) {
	for _, cluster := range clusterSizes {
		for _, compression := range []Compression{None, Zlib, Zstd} {
			for _, backed := range []bool{false, true} {
				if cluster >= 64<<10 && compression == Zstd {
					continue // takes long, and shows no more than zlib
				}
				for seed := range 1 + min(1, uint64(4096/cluster)) {
					t.Run(fmt.Sprintf("%d %s backed %v seed %d", cluster, compression, backed, seed), func(t *testing.T) {
						killAndResume(t, cluster, compression, backed, seed)
					})
				}
			}
		}
	}
}

func killAndResume(t *testing.T, cluster int64, compression Compression, backed bool, seed uint64) {
	r := rand.New(rand.NewPCG(seed, uint64(cluster)))
	size := max(6, min(300, 4<<20/cluster))*cluster - 512*int64(r.IntN(2))
	content := fragments(seed, int(size))
	for range 6 {
		at := r.IntN(int(size))
		clear(content[at:min(at+r.IntN(int(size)/6), int(size))])
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.qcow2")
	o := Options{ClusterSize: cluster, Compression: compression}
	if backed {
		base := bytes.Clone(content)
		for range 20 {
			at := r.IntN(int(size))
			copy(base[at:], fragments(seed+100, 1+r.IntN(2*int(cluster))))
		}
		if err := os.WriteFile(filepath.Join(dir, "base"), base, 0o600); err != nil {
			t.Fatal(err)
		}
		o.Backing, o.BackingName, o.BackingFormat = memory(base), "base", "raw"
	}
	var from taken
	for run := 0; ; run++ {
		next := o
		next.State, next.Resume = from.state, from.off
		d, err := Create(t.Context(), path, size, next)
		if err != nil {
			t.Fatalf("run %d at %d: %v", run, from.off, err)
		}
		defer d.Abort()
		w := newWriter(d, o, content, r)
		kept := []taken{from}
		steps := r.IntN(60)
		off := from.off
		for ; off < size && (steps > 0 || run > 12); steps-- {
			if off, err = w.step(off); err != nil {
				t.Fatal(err)
			}
			if r.IntN(6) == 0 || off == size {
				state, sync, err := d.Checkpoint(off)
				if err == nil {
					err = sync(t.Context())
				}
				if err != nil {
					t.Fatal(err)
				}
				kept = append(kept, taken{off, state})
			}
		}
		if off == size && r.IntN(2) == 0 {
			if err := errors.Join(d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
				t.Fatal(err)
			}
			break
		}
		// Killed: what is in memory may be in the file, or not.
		if r.IntN(2) == 0 {
			if err := inner(d).out.flush(); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Suspend(); err != nil {
			t.Fatal(err)
		}
		if from = kept[max(0, len(kept)-1-r.IntN(2))]; from.state == nil {
			if err := os.Remove(path + ".partial"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := read(t, path, o.Backing); !bytes.Equal(got, content) {
		t.Error("the image has another content")
	}
	peer.Need(t, "qemu-img")
	raw := filepath.Join(dir, "raw")
	if err := os.WriteFile(raw, content, 0o600); err != nil {
		t.Fatal(err)
	}
	verify(t, raw, path)
}

// A state that does not fit is refused, and the file stays as it is.
func TestBadState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	o := Options{ClusterSize: 4096}
	d, err := Create(t.Context(), path, 8<<20, o)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	if _, err := d.WriteAt(fragments(1, 4<<20), 0); err != nil {
		t.Fatal(err)
	}
	state, sync, err := d.Checkpoint(4 << 20)
	if err := errors.Join(err, sync(t.Context()), d.Suspend()); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path + ".partial")
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Options){
		"none of qcow2":  func(o *Options) { o.State = []byte("raw 8388608") },
		"empty":          func(o *Options) { o.State = []byte{} },
		"other cluster":  func(o *Options) { o.ClusterSize = 8192 },
		"compressed":     func(o *Options) { o.Compression = Zlib },
		"odd":            func(o *Options) { o.Resume++ },
		"behind":         func(o *Options) { o.Resume = 9 << 20 },
		"cut":            func(o *Options) { o.State = o.State[:20] },
		"negative":       func(o *Options) { o.State = []byte("qcow2 8388608 4096 none -5 -20480 0\nraw -1") },
		"too large":      func(o *Options) { o.State = []byte("qcow2 8388608 4096 none 99999 409595904 0\nraw -1") },
		"head elsewhere": func(o *Options) { o.State = []byte("qcow2 8388608 4096 none 131 0 0\nraw -1") },
	} {
		o := o
		o.State, o.Resume = state, 4<<20
		change(&o)
		if d, err := Create(t.Context(), path, 8<<20, o); err == nil {
			d.Abort()
			t.Errorf("%s: no error", name)
		}
		if after, err := os.ReadFile(path + ".partial"); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s: the file was changed, %v", name, err)
		}
	}
	// Tables that are damaged.
	damaged := bytes.Clone(before)
	copy(damaged[8192:], []byte{0x80, 0, 0, 1, 0, 0, 0, 0})
	if err := os.WriteFile(path+".partial", damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	o.State, o.Resume = state, 4<<20
	if d, err := Create(t.Context(), path, 8<<20, o); err == nil {
		d.Abort()
		t.Error("an entry of the L1 table past the file: no error")
	}
}

// TestLaterTablesAreGone checks that a resumed run removes what the stopped run
// wrote after the checkpoint, even if the resumed run writes nothing itself.
func TestLaterTablesAreGone(t *testing.T) {
	const mib = 1 << 20
	for _, at := range []int64{300 * mib, 300*mib + 512, 100 * mib} {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		o := Options{ClusterSize: 512}
		d, err := Create(t.Context(), path, 320*mib, o)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Abort()
		content := make([]byte, 320*mib)
		copy(content, fragments(70, mib))
		if _, err := d.WriteAt(content[:mib], 0); err != nil {
			t.Fatal(err)
		}
		state, sync, err := d.Checkpoint(at)
		if err := errors.Join(err, sync(t.Context())); err != nil {
			t.Fatal(err)
		}
		if _, err := d.WriteAt(fragments(71, mib), 300*mib+512); err != nil {
			t.Fatal(err)
		}
		_, sync, err = d.Checkpoint(301*mib + 512)
		if err := errors.Join(err, sync(t.Context()), d.Suspend()); err != nil {
			t.Fatal(err)
		}
		o.State, o.Resume = state, at
		if d, err = Create(t.Context(), path, 320*mib, o); err != nil {
			t.Fatal(err)
		}
		defer d.Abort()
		if err := errors.Join(d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(read(t, path, nil), content) {
			t.Errorf("resumed at %d: stale data shows", at)
		}
		peer.Need(t, "qemu-img")
		peer.Run(t, "qemu-img", "check", "-q", path)
	}
}

// TestCheckpointOfNothing resumes from a checkpoint of a disk that has only zeros
// so far.
func TestCheckpointOfNothing(t *testing.T) {
	for _, cluster := range clusterSizes {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		size := 8 * cluster
		o := Options{ClusterSize: cluster}
		d, err := Create(t.Context(), path, size, o)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Abort()
		if err := d.ZeroAt(t.Context(), 0, 4*cluster); err != nil {
			t.Fatal(err)
		}
		state, sync, err := d.Checkpoint(4 * cluster)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(sync(t.Context()), d.Suspend()); err != nil {
			t.Fatal(err)
		}
		o.State, o.Resume = state, 4*cluster
		if d, err = Create(t.Context(), path, size, o); err != nil {
			t.Fatal(err)
		}
		defer d.Abort()
		content := append(make([]byte, 4*cluster), fragments(70, int(4*cluster))...)
		if _, err := d.WriteAt(content[4*cluster:], 4*cluster); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(read(t, path, nil), content) {
			t.Errorf("clusters of %d: the image has another content", cluster)
		}
	}
}

// A file or device that reads as the backing, since nothing of the image is on it,
// is not taken for the one that was written.
func TestResumeOfAnotherFile(t *testing.T) {
	for _, fill := range []byte{0, 0xFF, 'P'} {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		content := fragments(71, 8*DefaultClusterSize)
		o := Options{BackingName: "base", BackingFormat: "raw"}
		o.Backing = memory(content)
		d, err := Create(t.Context(), path, int64(len(content)), o)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.SameAt(t.Context(), 0, 4*DefaultClusterSize); err != nil {
			t.Fatal(err)
		}
		state, sync, err := d.Checkpoint(4 * DefaultClusterSize)
		if err := errors.Join(err, sync(t.Context()), d.Suspend()); err != nil {
			t.Fatal(err)
		}
		partial := path + ".partial"
		written, err := os.ReadFile(partial)
		if err == nil {
			err = os.WriteFile(partial, bytes.Repeat([]byte{fill}, len(written)), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		o.State, o.Resume = state, 4*DefaultClusterSize
		if d, err = Create(t.Context(), path, int64(len(content)), o); err == nil {
			_, err = d.(sink.Readback).ReadAt(make([]byte, DefaultClusterSize), 0)
			d.Suspend()
		}
		if now, _ := os.ReadFile(partial); fill != 'P' && !bytes.HasPrefix(now, bytes.Repeat([]byte{fill}, DefaultClusterSize)) {
			t.Errorf("a file of bytes %#x: it was changed", fill)
		}
		if !errors.Is(err, sink.ErrUnfit) {
			t.Errorf("a file of bytes %#x: error %v, want %v", fill, err, sink.ErrUnfit)
		}
	}
}
