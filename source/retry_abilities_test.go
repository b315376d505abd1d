package source_test

import (
	"context"
	"os"
	"testing"
	"testing/synctest"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// able is a disk with every ability that Retry passes on.
type able struct {
	*sourcetest.Memory
	file     *os.File
	buffers  int
	uncached bool
}

func (a *able) Buffer(_ context.Context, n int) ([]byte, func(), error) {
	a.buffers++
	return make([]byte, n), func() {}, nil
}

func (a *able) InFile(off int64) (*os.File, int64, int64, bool) {
	return a.file, off, a.Size() - off, true
}

func (a *able) ReadUncached() { a.uncached = true }

func (a *able) Close() error { a.file.Close(); return a.Memory.Close() }

func TestRetryAbilities(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all []*able
		open := func(ctx context.Context) (source.Disk, error) {
			f, err := os.Open(os.Args[0])
			if err != nil {
				return nil, err
			}
			a := &able{Memory: &sourcetest.Memory{Context: ctx, Bytes: make([]byte, 1000), ID: "able", Description: source.Info{UUID: "a uuid"}}, file: f}
			if len(all) == 0 {
				a.OnRead = once(2)
			}
			all = append(all, a)
			return a, nil
		}
		d, err := source.Retry(t.Context(), open, source.RetryOptions{Retries: -1})
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := d.(source.Wrapper); ok {
			t.Error("it is a Wrapper")
		}
		uncached, _ := source.Ability[source.Uncached](d)
		uncached.ReadUncached()
		inFile, _ := source.Ability[source.InFile](d)
		file, _, _, ok := inFile.InFile(1)
		if !ok || file != all[0].file {
			t.Error("no InFile before a reopening")
		}
		if _, err := d.ReadAt(make([]byte, 10), 0); err != nil || len(all) != 2 {
			t.Fatal(err, len(all))
		}
		if _, _, _, ok := inFile.InFile(1); ok {
			t.Error("InFile after a reopening")
		}
		if _, err := file.Stat(); err != nil {
			t.Errorf("a file that was handed out, after a reopening: %v", err)
		}
		if !all[0].uncached || !all[1].uncached {
			t.Error("ReadUncached was not forwarded")
		}
		allocator, _ := source.Ability[source.Allocator](d)
		if p, free, err := allocator.Buffer(t.Context(), 10); err != nil || len(p) != 10 || all[1].buffers != 1 {
			t.Errorf("Buffer: %d, %v", len(p), err)
		} else {
			free()
		}
		identified, _ := source.Ability[source.Identified](d)
		if id, proof, err := identified.Identity(t.Context()); id != "able" || proof != "snapshot" || err != nil {
			t.Errorf("%q, %q, %v", id, proof, err)
		}
		described, _ := source.Ability[source.Described](d)
		if i := described.Info(); i.UUID != "a uuid" {
			t.Errorf("%+v", i)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if !all[0].Closed() || !all[1].Closed() {
			t.Error("a disk was not closed")
		}
	})
}

func TestRetryNoAbilities(t *testing.T) {
	d, err := source.Retry(t.Context(), func(context.Context) (source.Disk, error) {
		return plain{&sourcetest.Memory{Bytes: make([]byte, 1000)}}, nil
	}, source.RetryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, ok := source.Ability[source.Allocator](d); ok {
		t.Error("an Allocator out of nothing")
	}
	if _, ok := source.Ability[source.Described](d); ok {
		t.Error("a Described out of nothing")
	}
	if i, ok := source.Ability[source.Identified](d); ok {
		if id, proof, err := i.Identity(t.Context()); id != "" || proof != "none" || err != nil {
			t.Errorf("%q, %q, %v", id, proof, err)
		}
	}
	if f, ok := source.Ability[source.InFile](d); ok {
		if _, _, _, ok := f.InFile(0); ok {
			t.Error("InFile out of nothing")
		}
	}
}
