package inflate

import (
	"bytes"
	stdflate "compress/flate"
	"encoding/binary"
	"errors"
	stdadler "hash/adler32"
	"io"
	"slices"
	"testing"
)

// moreThan fails the test unless the stream in src really has more than n bytes, which
// a decoder with room for n bytes reported. A match has at most 258 bytes.
func moreThan(t *testing.T, src []byte, n int) {
	t.Helper()
	var d Decoder
	if got, _, err := d.Inflate(make([]byte, n+258), src); got <= n {
		t.Fatalf("room %d: n %d, %v, although the stream holds more than %d", n+258, got, err, n)
	}
}

// FuzzInflate tests that Inflate and compress/flate return the same bytes for any
// input, or both fail.
func FuzzInflate(f *testing.F) {
	const limit = 1 << 18
	f.Fuzz(func(t *testing.T, src []byte) {
		in := bytes.NewReader(src)
		want, wantErr := io.ReadAll(io.LimitReader(stdflate.NewReader(in), limit+1))
		var d Decoder
		check := func(room int, fill byte) {
			dst := garbage(room, fill)
			n, consumed, err := d.Inflate(dst, src)
			guarded(t, dst)
			if common := min(n, len(want)); !bytes.Equal(dst[:common], want[:common]) {
				t.Fatalf("room %d: other bytes", room)
			}
			if n > room || consumed > len(src) || n > len(want) && wantErr == nil {
				t.Fatalf("room %d: n %d, consumed %d of %d", room, n, consumed, len(src))
			}
			switch {
			case room < len(want):
				if n != room || !errors.Is(err, ErrTooLarge) {
					t.Fatalf("room %d: n %d, %v; expected %v", room, n, err, ErrTooLarge)
				}
			case wantErr == nil:
				if n != len(want) || consumed != len(src)-in.Len() || err != nil {
					t.Fatalf("room %d: %d, %d, %v; expected %d, %d, nil", room, n, consumed, err, len(want), len(src)-in.Len())
				}
			case n < len(want) && !errors.Is(err, ErrCorrupt): // Inflate refuses a block without a code for its end before its first byte
				t.Fatalf("room %d: n %d, %v; expected at least %d", room, n, err, len(want))
			case errors.Is(err, ErrTooLarge):
				moreThan(t, src, room)
			case !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrTruncated): // the reference may report either of two errors
				t.Fatalf("room %d: %v; expected an error, such as %v", room, err, wantErr)
			}
		}
		if len(want) > limit {
			check(limit, 0)
			return
		}
		// The reference reads ahead and drops the last bytes that it decoded before an
		// error. Therefore a stream that is an error for it may have more bytes than
		// want, and more than limit.
		if wantErr == nil {
			for _, less := range []int{1, 17, 300} {
				check(max(len(want)-less, 0), 0xff)
			}
			check(len(want), 0x5a)
			check(len(want)+1, 0)
		}
		check(limit, 0xa5)
	})
}

// FuzzRoundTrip tests that Inflate decodes what compress/flate writes at any level,
// with a flush in the middle.
func FuzzRoundTrip(f *testing.F) {
	var writers [12]*stdflate.Writer // reused, because creating one is slow
	f.Fuzz(func(t *testing.T, p []byte, level uint8, flush uint16) {
		w := writers[level%12]
		if w == nil {
			var err error
			if w, err = stdflate.NewWriter(nil, int(level%12)-2); err != nil {
				t.Fatal(err)
			}
			writers[level%12] = w
		}
		var b bytes.Buffer
		w.Reset(&b)
		cut := min(int(flush), len(p))
		w.Write(p[:cut])
		if flush%2 == 1 {
			w.Flush()
		}
		w.Write(p[cut:])
		w.Close()

		var d Decoder
		for _, more := range []int{0, 1, 40} {
			dst := garbage(len(p)+more, byte(more))
			n, consumed, err := d.Inflate(dst, b.Bytes())
			guarded(t, dst)
			if n != len(p) || consumed != b.Len() || err != nil || !bytes.Equal(dst[:n], p) {
				t.Fatalf("room %d: %d, %d, %v; expected %d, %d, nil", len(dst), n, consumed, err, len(p), b.Len())
			}
		}
		src := binary.BigEndian.AppendUint32(slices.Concat([]byte{0x78, 0x9c}, b.Bytes()), stdadler.Checksum(p))
		dst := garbage(len(p), 0)
		if n, consumed, err := d.Zlib(dst, src); n != len(p) || consumed != len(src) || err != nil || !bytes.Equal(dst, p) {
			t.Fatalf("Zlib = %d, %d, %v; expected %d, %d, nil", n, consumed, err, len(p), len(src))
		}
	})
}
