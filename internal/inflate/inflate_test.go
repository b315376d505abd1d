package inflate

import (
	"bytes"
	stdadler "hash/adler32"
	"testing"
)

func TestGrains(t *testing.T) {
	var d Decoder
	for i, g := range grains(t, 40) {
		for level := -2; level <= 9; level++ {
			c := zlibbed(t, g, level)
			dst := bytes.Repeat([]byte{0xa5}, grain)
			n, consumed, err := d.Zlib(dst, append(c, "more"...))
			if n != grain || consumed != len(c) || err != nil {
				t.Fatalf("grain %d, level %d: Zlib = %d, %d, %v; expected %d, %d, nil", i, level, n, consumed, err, grain, len(c))
			}
			if !bytes.Equal(dst, g) {
				t.Fatalf("grain %d, level %d: other bytes", i, level)
			}
		}
	}
}

func TestAdler32(t *testing.T) {
	for _, fill := range []byte{0xff, 0, 7} {
		p := bytes.Repeat([]byte{fill}, 100000)
		for i := range p {
			if fill == 7 {
				p[i] = byte(i * i >> 3)
			}
		}
		for n := 0; n <= len(p); n = n + 1 + n/64 {
			if got, want := adler32(p[:n]), stdadler.Checksum(p[:n]); got != want {
				t.Fatalf("adler32(%d bytes) = %#08x, expected %#08x", n, got, want)
			}
		}
	}
}
