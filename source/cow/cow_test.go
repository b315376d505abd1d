package cow_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/cow"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// random returns n random bytes other than zero.
func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

// below is a disk with data, a hole, and data again.
func absent(size int) *sourcetest.Memory {
	b := random(1, size)
	from, to := size/4, size/2
	clear(b[from:to])
	m := &sourcetest.Memory{Bytes: b, ID: "disk"}
	if size > 4 {
		m.ExtentList = []source.Extent{{Len: int64(from)}, {Off: int64(from), Len: int64(to - from), Kind: source.Zero, Absent: true}, {Off: int64(to), Len: int64(size - to)}}
	}
	return m
}

func TestDisk(t *testing.T) {
	for name, o := range map[string]cow.Options{
		"temporary": {},
		"onRead":    {OnRead: true},
		"file":      {File: "d.cow", BlockSize: 4096},
		"large":     {BlockSize: 2 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{0, 1, 512, 3<<20 + 512, 5<<20 + 77} {
				m := absent(size)
				content := bytes.Clone(m.Bytes)
				if o.File != "" {
					o.File = filepath.Join(t.TempDir(), "d.cow")
				}
				sourcetest.Run(t, sourcetest.Config{Content: content, Open: func(ctx context.Context, t testing.TB) source.Disk {
					m := &sourcetest.Memory{Context: ctx, Bytes: bytes.Clone(m.Bytes), ID: "disk", ExtentList: m.ExtentList}
					d, err := cow.New(ctx, m, o)
					if err != nil {
						t.Fatal(err)
					}
					// Some blocks are written with the content that they have, and some
					// that are zeros are zeroed.
					n := int64(size)
					for off := int64(0); off < n; off += 900 << 10 {
						if _, err := d.WriteAt(content[off:min(n, off+100<<10)], off); err != nil {
							t.Fatal(err)
						}
					}
					if err := d.ZeroAt(ctx, n/4, n/2-n/4, source.MayTrim); err != nil {
						t.Fatal(err)
					}
					return d
				}})
			}
		})
	}
}
