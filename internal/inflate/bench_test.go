package inflate

import (
	"bytes"
	stdzlib "compress/zlib"
	"fmt"
	stdadler "hash/adler32"
	"io"
	"testing"

	"github.com/klauspost/compress/zlib"
)

func BenchmarkZlib(b *testing.B) {
	all := grains(b, 64)
	type resetter interface {
		io.Reader
		Reset(io.Reader, []byte) error
	}
	stream := func(r io.Reader, err error) func(dst, src []byte) error {
		if err != nil {
			b.Fatal(err)
		}
		z, in := r.(resetter), bytes.NewReader(nil)
		return func(dst, src []byte) error {
			in.Reset(src)
			if err := z.Reset(in, nil); err != nil {
				return err
			}
			if _, err := io.ReadFull(z, dst); err != nil {
				return err
			}
			if n, err := z.Read(dst[:1]); n != 0 || err != io.EOF { // makes the reader compare the checksum
				return fmt.Errorf("%d, %w after the end", n, err)
			}
			return nil
		}
	}
	empty := zlibbed(b, nil, 6)
	var d Decoder
	for _, who := range []struct {
		name   string
		decode func(dst, src []byte) error
	}{
		{"ours", func(dst, src []byte) error {
			_, _, err := d.Zlib(dst, src)
			return err
		}},
		{"klauspost", stream(zlib.NewReader(bytes.NewReader(empty)))},
		{"stdlib", stream(stdzlib.NewReader(bytes.NewReader(empty)))},
	} {
		for _, level := range []int{1, 6, 9} {
			b.Run(fmt.Sprintf("%s/level=%d", who.name, level), func(b *testing.B) {
				in := make([][]byte, len(all))
				for i, g := range all {
					in[i] = zlibbed(b, g, level)
				}
				dst := make([]byte, grain)
				b.SetBytes(grain)
				b.ReportAllocs()
				i := 0
				for b.Loop() {
					if err := who.decode(dst, in[i%len(in)]); err != nil {
						b.Fatal(err)
					}
					i++
				}
			})
		}
	}
}

func BenchmarkAdler32(b *testing.B) {
	p := grains(b, 1)[0]
	for _, who := range []struct {
		name string
		sum  func([]byte) uint32
	}{{"ours", adler32}, {"stdlib", stdadler.Checksum}} {
		b.Run(who.name, func(b *testing.B) {
			b.SetBytes(int64(len(p)))
			b.ReportAllocs()
			for b.Loop() {
				who.sum(p)
			}
		})
	}
}
