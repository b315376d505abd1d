package wire

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"
)

func TestFragment(t *testing.T) {
	got := ParseFragment((*[44]byte)(unhex(t, `1817161514131211 01000000 03000000 8877665544332211
		24232221 34333231 44434241 54535251 ffffffff`)))
	want := Fragment{Status: 0x1112131415161718, Direction: 1, Compression: SkipZ, Off: 0x1122334455667788,
		RequestLen: 0x21222324, Place: 0x31323334, Len: 0x41424344, Packed: 0x51525354}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got, want := got.Fields(), "status 1230066625199609624, direction 1, compression skipz, offset 1234605616436508552, length 555885348, fragment at 825373492, fragment length 1094861636, 1364349780 bytes follow"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestCheck(t *testing.T) {
	const buffer = 65536
	read := Read{Handle: 1, Off: 1 << 40, Len: 1 << 20, Compression: SkipZ}
	plain := Fragment{Off: 1 << 40, RequestLen: 1 << 20, Place: 65536, Len: 65536, Packed: 65536, Direction: 1}
	packed := plain
	packed.Compression, packed.Packed = SkipZ, 8
	tests := []struct {
		name    string
		f       Fragment
		change  func(f *Fragment)
		problem string
	}{
		{"plain", plain, func(f *Fragment) {}, ""},
		{"packed", packed, func(f *Fragment) {}, ""},
		{"status", plain, func(f *Fragment) { f.Status = 11 }, ""},
		{"first", plain, func(f *Fragment) { f.Place = 0 }, ""},
		{"last", plain, func(f *Fragment) { f.Place = 1<<20 - 65536 }, ""},
		{"shortest", plain, func(f *Fragment) { f.Len, f.Packed = 1, 1 }, ""},
		{"packed into one byte", packed, func(f *Fragment) { f.Packed = 1 }, ""},
		{"packed most", packed, func(f *Fragment) { f.Packed = 65536 + 65536 }, ""},
		{"direction 0", plain, func(f *Fragment) { f.Direction = 0 }, "expected the direction 1 in an answer to the read of 1048576 bytes at offset 1099511627776, found 0 (status 0, direction 0,"},
		{"direction 2", plain, func(f *Fragment) { f.Direction = 2 }, "found 2 (status"},
		{"offset", plain, func(f *Fragment) { f.Off++ }, "expected the offset 1099511627776 in an answer"},
		{"negative offset", plain, func(f *Fragment) { f.Off = -1 }, "found 18446744073709551615 ("},
		{"request length", plain, func(f *Fragment) { f.RequestLen = 512 }, "expected the length 1048576 in an answer to the read of 1048576 bytes at offset 1099511627776, found 512 ("},
		{"empty", plain, func(f *Fragment) { f.Len, f.Packed = 0, 0 }, "expected a fragment of at least 1 byte in an answer to"},
		{"empty at the end", plain, func(f *Fragment) { f.Place, f.Len, f.Packed = 1<<20, 0, 0 }, "found 0 bytes"},
		{"empty packed", packed, func(f *Fragment) { f.Len = 0 }, "found 0 bytes"},
		{"longer than a buffer", plain, func(f *Fragment) { f.Len, f.Packed = 65537, 65537 }, "expected a fragment of at most 65536 bytes, the size of a buffer, in an answer to"},
		{"longer than a buffer when unpacked", packed, func(f *Fragment) { f.Len = 65537 }, "found 65537 ("},
		{"beyond the end", plain, func(f *Fragment) { f.Place = 1<<20 - 65535 }, "expected a fragment inside the read in an answer to the read of 1048576 bytes at offset 1099511627776, found bytes [983041, 1048577) ("},
		{"overflow", plain, func(f *Fragment) { f.Place = math.MaxUint32 }, "found bytes [4294967295, 4295032831)"},
		{"zlib", packed, func(f *Fragment) { f.Compression = Zlib }, "expected the compression skipz or none in an answer"},
		{"fastlz", packed, func(f *Fragment) { f.Compression = FastLZ }, "found fastlz ("},
		{"unknown compression", packed, func(f *Fragment) { f.Compression = 7 }, "found unknown compression 7 ("},
		{"plain, less", plain, func(f *Fragment) { f.Packed-- }, "expected an uncompressed fragment with 65536 bytes of data in an answer"},
		{"plain, more", plain, func(f *Fragment) { f.Packed++ }, "found 65537 ("},
		{"packed, nothing", packed, func(f *Fragment) { f.Packed = 0 }, "expected a compressed fragment with 1 to 131072 bytes of data in an answer"},
		{"packed, too much", packed, func(f *Fragment) { f.Packed = 65536 + 65536 + 1 }, "found 131073 ("},
		{"packed, huge", packed, func(f *Fragment) { f.Packed = math.MaxUint32 }, "found 4294967295 ("},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			test.change(&test.f)
			checkError(t, test.f.Check(read, buffer), test.problem)
		})
	}
	read.Compression = Plain
	checkError(t, plain.Check(read, buffer), "")
	checkError(t, packed.Check(read, buffer), "expected the compression none in an answer")
}

func TestSkipZErrors(t *testing.T) {
	tests := []struct{ name, digits, problem string }{
		{"nothing", "", "expected at least 8 bytes of skipz data, found 0 bytes"},
		{"cut off", "10000000 000000", "found 7 bytes (bytes 10 00 00 00 00 00 00)"},
		{"shorter", "0f000000 00000000", "expected skipz data for 16 bytes, found skipz data for 15 bytes"},
		{"longer", "11000000 00000000", "found skipz data for 17 bytes"},
		{"huge", "ffffffff 00000000", "found skipz data for 4294967295 bytes"},
		{"reserved", "10000000 01000000", "expected the number 0 at offset 4 of skipz data, found the number 1"},
		{"run cut off", "10000000 00000000 00000000 010000", "expected a skipz run, at least 8 bytes, or the end of the data at offset 8, found 7 bytes"},
		{"one more byte", "10000000 00000000 00000000 01000000 01 00", "expected a skipz run, at least 8 bytes, or the end of the data at offset 17, found 1 bytes"},
		{"empty run", "10000000 00000000 00000000 00000000", "expected a skipz run of at least 1 byte inside [0, 16) at offset 8 of the data, found the run [0, 0)"},
		{"beyond", "10000000 00000000 10000000 01000000 01", "found the run [16, 17)"},
		{"across the end", "10000000 00000000 0f000000 02000000 0101", "found the run [15, 17)"},
		{"overflow", "10000000 00000000 ffffffff ffffffff 01", "found the run [4294967295, 8589934590)"},
		{"overlap", "10000000 00000000 02000000 02000000 0101 03000000 01000000 02", "expected a skipz run of at least 1 byte inside [4, 16) at offset 18 of the data, found the run [3, 4)"},
		{"descending", "10000000 00000000 02000000 02000000 0101 00000000 01000000 02", "found the run [0, 1)"},
		{"bytes missing", "10000000 00000000 02000000 03000000 0101", "expected 3 bytes of a skipz run at offset 16 of the data, found 2 bytes"},
		{"no bytes", "10000000 00000000 02000000 03000000", "found 0 bytes"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			guarded := bytes.Repeat([]byte{0xee}, 48)
			checkError(t, DecodeSkipZ(guarded[16:32], unhex(t, test.digits)), test.problem)
			if edge := bytes.Repeat([]byte{0xee}, 16); !bytes.Equal(guarded[:16], edge) || !bytes.Equal(guarded[32:], edge) {
				t.Errorf("bytes outside of dst were changed: % x", guarded)
			}
		})
	}
	if err := DecodeSkipZ(nil, make([]byte, 8)); err != nil {
		t.Errorf("no bytes at all: %v", err)
	}
}

// encodeSkipZ is a simple encoder. A run ends where at least minGap zeros follow.
func encodeSkipZ(p []byte, minGap int) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(p)))
	b = append(b, 0, 0, 0, 0)
	for at := 0; at < len(p); {
		if p[at] == 0 {
			at++
			continue
		}
		end, zeros := at, 0
		for i := at; i < len(p) && zeros < minGap; i++ {
			if zeros++; p[i] != 0 {
				end, zeros = i+1, 0
			}
		}
		b = binary.LittleEndian.AppendUint32(b, uint32(at))
		b = binary.LittleEndian.AppendUint32(b, uint32(end-at))
		b = append(b, p[at:end]...)
		at = end
	}
	return b
}

// sparse returns n bytes in which runs of zeros and of other bytes alternate.
func sparse(r *rand.Rand, n, run int) []byte {
	p := make([]byte, n)
	for at := r.IntN(run); at < n; at += 1 + r.IntN(run) {
		for end := min(n, at+1+r.IntN(run)); at < end; at++ {
			p[at] = byte(r.Uint32())
		}
	}
	return p
}

func TestSkipZRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		p := sparse(r, r.IntN(600), 1+r.IntN(40))
		encoded := encodeSkipZ(p, 1+r.IntN(12))
		got := bytes.Repeat([]byte{0xee}, len(p))
		if err := DecodeSkipZ(got, encoded); err != nil {
			t.Fatalf("% x: %v", encoded, err)
		}
		if !bytes.Equal(got, p) {
			t.Fatalf("% x: got\n% x\nwant\n% x", encoded, got, p)
		}
		// A prefix is valid only if it ends where a run ends.
		if len(encoded) > 0 {
			cut := encoded[:r.IntN(len(encoded))]
			if err, want := DecodeSkipZ(got, cut), naiveSkipZ(len(p), cut) == nil; (err != nil) != want {
				t.Fatalf("% x: got %v, want an error: %v", cut, err, want)
			}
		}
	}
}

// encodeFragment encodes the payload of an answer to a Read.
func encodeFragment(f Fragment) []byte {
	b := binary.LittleEndian.AppendUint64(nil, f.Status)
	b = binary.LittleEndian.AppendUint32(b, f.Direction)
	b = binary.LittleEndian.AppendUint32(b, uint32(f.Compression))
	b = binary.LittleEndian.AppendUint64(b, uint64(f.Off))
	for _, v := range []uint32{f.RequestLen, f.Place, f.Len, f.Packed, 0} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

func BenchmarkDecodeSkipZ(b *testing.B) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, test := range []struct {
		name string
		p    []byte
	}{
		{"Zeros", make([]byte, 65536)},
		{"Half", sparse(r, 65536, 4096)},
		{"ShortRuns", sparse(r, 65536, 32)},
		{"Full", bytes.Repeat([]byte{1}, 65536)},
	} {
		b.Run(test.name, func(b *testing.B) {
			encoded, dst := encodeSkipZ(test.p, 16), make([]byte, len(test.p))
			b.SetBytes(int64(len(dst)))
			b.ReportAllocs()
			for b.Loop() {
				if err := DecodeSkipZ(dst, encoded); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkReadAppend(b *testing.B) {
	buf := make([]byte, 0, HeaderSize+ReadSize)
	r := Read{Handle: 1, Off: 1 << 40, Len: MaxRead, Compression: SkipZ}
	b.ReportAllocs()
	for b.Loop() {
		buf = r.Append(buf[:0], 7)
	}
}

func BenchmarkFragment(b *testing.B) {
	payload := [ReadSize]byte(encodeFragment(Fragment{Off: 4096, RequestLen: 4096, Len: 4096, Packed: 4096, Direction: 1}))
	r := Read{Off: 4096, Len: 4096}
	b.ReportAllocs()
	for b.Loop() {
		if err := ParseFragment(&payload).Check(r, 65536); err != nil {
			b.Fatal(err)
		}
	}
}
