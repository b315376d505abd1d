package vmdk_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/sink/vmdk"
)

// files are n bytes of real files, in the order of their names.
func files(t testing.TB, n int) []byte {
	t.Helper()
	all := make([]byte, 0, n)
	err := filepath.WalkDir(peer.Tree(t), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		all = append(all, b...)
		if len(all) >= n {
			return fs.SkipAll
		}
		return err
	})
	if err != nil || len(all) < n {
		t.Fatalf("%d bytes of files, %v", len(all), err)
	}
	return all[:n]
}

// null is an image whose bytes go nowhere.
func null(t testing.TB, size int64, o vmdk.Options) sink.Disk {
	t.Helper()
	d, err := vmdk.Create(t.Context(), raw.Null(t.Context(), sink.UnknownSize), "null:", size, o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// BenchmarkEncode is one goroutine's encoding of real files.
func BenchmarkEncode(b *testing.B) {
	content := files(b, 16<<20)
	for level := vmdk.MinLevel; level <= vmdk.MaxLevel; level++ {
		b.Run(fmt.Sprintf("level=%d", level), func(b *testing.B) {
			encoding := null(b, 1<<30, vmdk.Options{Level: level}).(sink.Encoder).NewEncoding()
			b.SetBytes(int64(len(content)))
			b.ReportAllocs()
			var enc []byte
			var total int
			for b.Loop() {
				total = 0
				for off := 0; off < len(content); off += grain {
					var err error
					if enc, _, err = encoding.Encode(enc[:0], content[off:off+grain], int64(off)); err != nil {
						b.Fatal(err)
					}
					total += len(enc)
				}
			}
			b.ReportMetric(float64(total)/float64(len(content))*100, "%size")
		})
	}
}

// BenchmarkWrite is the sink alone, without encoding, at utilisations of 0, 50
// and 100 %.
func BenchmarkWrite(b *testing.B) {
	const size = 256 << 20
	content := files(b, grain)
	for _, used := range []int64{0, 50, 100} {
		b.Run(fmt.Sprintf("used=%d", used), func(b *testing.B) {
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				d := null(b, size, vmdk.Options{})
				e := d.(sink.Encoder)
				enc, _, err := e.NewEncoding().Encode(nil, content, 0)
				for g := int64(0); g < size/grain && err == nil; g++ {
					if g*used/100 != (g+1)*used/100 {
						err = e.Place(g*grain, enc, false)
					} else {
						err = d.ZeroAt(b.Context(), g*grain, grain)
					}
				}
				if err == nil {
					err = d.Finish(b.Context())
				}
				if err != nil {
					b.Fatal(err)
				}
				d.Abort()
			}
		})
	}
}
