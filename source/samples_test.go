package source_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// unproved is a disk whose content nothing proves, such as that of an NBD server.
type unproved struct{ *sourcetest.Memory }

func (unproved) Identity(context.Context) (id, proof string, err error) {
	return "the name", "none", nil
}

// TestRetryOtherContent tests that a disk without a proof is compared with earlier
// reads when it is opened again.
func TestRetryOtherContent(t *testing.T) {
	const size, piece = 64 << 20, 1 << 20
	random := content(size)
	changed := func(offs ...int) []byte {
		b := bytes.Clone(random)
		for _, off := range offs {
			b[off] ^= 1
		}
		return b
	}
	halfZero := bytes.Clone(random)
	clear(halfZero[:size/2])
	for _, test := range []struct {
		name          string
		before, after []byte
		o             source.RetryOptions
		fails         int // number of reads that fail after the disk is opened again
		cut           int // number of reopened disks whose reads all fail
		changed       bool
	}{
		{name: "the same", before: random, after: random},
		{name: "another disk", before: random, after: content(2 * size)[size:], changed: true},
		{name: "what was read last", before: random, after: changed(31 * piece), changed: true},
		{name: "what was not read yet", before: random, after: changed(50 * piece)},
		{name: "zeros were read", before: halfZero, after: random, changed: true},
		{name: "comparing fails once", before: random, after: random, fails: 1},
		{name: "comparing fails always", before: random, after: random, cut: 1},
		{name: "comparing fails always, and it is another one", before: random, after: content(2 * size)[size:], cut: 2, changed: true},
		// The read that fails may be of one of the changed pieces, so that there are
		// two.
		{name: "comparing fails, and it is another one", before: random, after: changed(30*piece, 31*piece), fails: 1, changed: true},
		{name: "mutable", before: random, after: content(2 * size)[size:], o: source.RetryOptions{Mutable: true}},
		{name: "for a server", before: random, after: content(2 * size)[size:], o: source.RetryOptions{Revive: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := &opener{content: test.before}
				o.each = func(n int, m *sourcetest.Memory) error {
					if n > 1 {
						m.Bytes = test.after
					}
					if n == 1 {
						m.OnRead = func(off int64, _ int) error {
							if off == size/2 {
								return errBroken
							}
							return nil
						}
					} else if n <= 1+test.cut {
						m.OnRead = once(1 << 20)
					} else {
						m.OnRead = once(test.fails)
					}
					return nil
				}
				test.o.Retries, test.o.Backoff = -1, seconds
				d, err := source.Retry(t.Context(), func(ctx context.Context) (source.Disk, error) {
					d, err := o.open(ctx)
					if err != nil {
						return nil, err
					}
					return unproved{d.(*sourcetest.Memory)}, nil
				}, test.o)
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				p := make([]byte, piece)
				for off := int64(0); off < size; off += piece {
					if _, err = d.ReadAt(p, off); err != nil {
						break
					}
					if want := test.after[off:][:piece]; off >= size/2 && !bytes.Equal(p, want) {
						t.Errorf("wrong content at %d", off)
					}
				}
				if test.changed != errors.Is(err, source.ErrChanged) || !test.changed && err != nil {
					t.Errorf("%v, want an ErrChanged: %v", err, test.changed)
				}
				if want := 2 + test.cut; o.tried != want {
					t.Errorf("opened %d times, want %d", o.tried, want)
				}
			})
		})
	}
}

// TestRetryUncachedWhileReopening calls ReadUncached while the disk is being opened
// again. The call must reach the new disk.
func TestRetryUncachedWhileReopening(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all []*unprovedAble
		var d source.Disk
		open := func(ctx context.Context) (source.Disk, error) {
			a := &unprovedAble{unproved: unproved{&sourcetest.Memory{Context: ctx, Bytes: content(1000)}}}
			all = append(all, a)
			if len(all) == 1 {
				broken := false
				a.OnRead = func(off int64, _ int) error {
					if broken = broken || off > 0; broken {
						return errBroken
					}
					return nil
				}
				return a, nil
			}
			a.OnRead = func(off int64, _ int) error {
				if off == 0 { // a read of the comparison
					uncached, _ := source.Ability[source.Uncached](d)
					uncached.ReadUncached()
				}
				return nil
			}
			return a, nil
		}
		var err error
		if d, err = source.Retry(t.Context(), open, source.RetryOptions{Retries: -1}); err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		for _, off := range []int64{0, 500} {
			if _, err := d.ReadAt(make([]byte, 10), off); err != nil {
				t.Fatal(err)
			}
		}
		if len(all) != 2 || !all[1].uncached {
			t.Errorf("%d openings; the last disk was told: %v", len(all), all[len(all)-1].uncached)
		}
	})
}

// unprovedAble is an unproved disk that is also Uncached.
type unprovedAble struct {
	unproved
	uncached bool
}

func (a *unprovedAble) ReadUncached() { a.uncached = true }
