package inflate

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	stdadler "hash/adler32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// guard is the content of the memory after dst, which must not change.
var guard = bytes.Repeat([]byte{0xc3}, 64)

// garbage returns n random bytes with a capacity of n as dst, followed in memory by
// guard.
func garbage(n int, v byte) []byte {
	b := append(bytes.Repeat([]byte{v}, n), guard...)
	return b[:n]
}

func guarded(t testing.TB, dst []byte) {
	t.Helper()
	if !bytes.Equal(dst[:len(dst)+len(guard)][len(dst):], guard) {
		t.Fatalf("wrote past the %d bytes of dst", len(dst))
	}
}

// reference returns what the standard library decodes from a stream, at most limit
// bytes.
func reference(src []byte, limit int) (out []byte, consumed int, err error) {
	in := bytes.NewReader(src)
	out, err = io.ReadAll(io.LimitReader(flate.NewReader(in), int64(limit)))
	return out, len(src) - in.Len(), err
}

func TestGrains(t *testing.T) {
	var d Decoder
	for i, g := range grains(t, 16) {
		for _, level := range []int{-2, -1, 0, 1, 4, 9} {
			c := zlibbed(t, g, level)
			dst := garbage(grain, 0xa5)
			n, consumed, err := d.Zlib(dst, append(c, "more"...))
			if n != grain || consumed != len(c) || err != nil {
				t.Fatalf("grain %d, level %d: Zlib = %d, %d, %v; expected %d, %d, nil", i, level, n, consumed, err, grain, len(c))
			}
			if !bytes.Equal(dst, g) {
				t.Fatalf("grain %d, level %d: other bytes", i, level)
			}
			guarded(t, dst)
		}
	}
}

func TestStreams(t *testing.T) {
	a, b := fixedLitlen['a'], fixedLitlen['b']
	end := fixedLitlen[256]
	fixed := func() *writer { return new(writer).bits(1, 1).bits(1, 2) }
	one := lens(257, map[int]uint{'a': 2, 'b': 2, 256: 1})
	withLength := lens(258, map[int]uint{'a': 2, 256: 2, 257: 1})
	pad := make([]byte, 64)

	for _, c := range []struct {
		name string
		src  []byte
		want string // the decoded bytes
		err  error
		text string // a part of the error
	}{
		{name: "fixed, empty", src: []byte{3, 0}},
		{name: "fixed", src: []byte{0x4b, 4, 0}, want: "a"},
		{name: "fixed, all lengths of codes", src: fixed().code(a).code(fixedLitlen[0xff]).code(end).bytes, want: "a\xff"},
		{name: "fixed, match", src: fixed().code(a).code(b).match(fixedLitlen, fixedDist, 5, 2).code(end).bytes, want: "abababa"},
		{name: "stored, empty", src: []byte{1, 0, 0, 0xff, 0xff}},
		{name: "stored", src: []byte{1, 3, 0, 0xfc, 0xff, 'a', 'b', 'c'}, want: "abc"},
		{name: "stored after fixed", src: new(writer).bits(0, 1).bits(1, 2).code(a).code(b).code(end).bits(1, 1).bits(0, 2).raw(1, 0, 0xfe, 0xff, 'c').bytes, want: "abc"},
		{name: "fixed and dynamic in turn", src: new(writer).bits(0, 1).bits(1, 2).code(a).code(end).
			dynamic(0, one, []uint{0}).code(codes(one)['b']).code(codes(one)[256]).
			bits(0, 1).bits(1, 2).code(a).code(end).bits(1, 1).bits(1, 2).code(b).code(end).bytes, want: "abab"},
		{name: "dynamic, no distance", src: new(writer).dynamic(1, one, []uint{0}).code(codes(one)['a']).code(codes(one)['b']).code(codes(one)[256]).bytes, want: "ab"},
		{name: "dynamic, one distance", src: new(writer).dynamic(1, withLength, []uint{1}).code(codes(withLength)['a']).code(codes(withLength)[257]).bits(0, 1).code(codes(withLength)[256]).bytes, want: "aaaa"},
		{name: "only the end of block", src: new(writer).dynamic(1, lens(257, map[int]uint{256: 1}), []uint{0}).bits(0, 1).bytes},

		{name: "nothing", err: ErrTruncated},
		{name: "block type 3", src: []byte{7}, err: ErrCorrupt, text: "offset 0: invalid block type 3"},
		{name: "stored, complement", src: []byte{1, 3, 0, 0xfc, 0xfe, 'a', 'b', 'c'}, err: ErrCorrupt, text: "0x0003 of the stored block does not match its complement 0xfefc"},
		{name: "stored, cut", src: []byte{1, 3, 0, 0xfc, 0xff, 'a', 'b'}, want: "ab", err: ErrTruncated, text: "offset 7"},
		{name: "fixed, length 286", src: fixed().code(a).code(fixedLitlen[286]).raw(pad...).bytes, want: "a", err: ErrCorrupt, text: "invalid length code"},
		{name: "fixed, length 287", src: fixed().code(fixedLitlen[287]).bytes, err: ErrCorrupt, text: "invalid length code"},
		{name: "fixed, distance 30", src: fixed().code(a).code(fixedLitlen[257]).code(fixedDist[30]).raw(pad...).bytes, want: "a", err: ErrCorrupt, text: "invalid distance code"},
		{name: "fixed, distance 31", src: fixed().code(a).code(fixedLitlen[257]).code(fixedDist[31]).bytes, want: "a", err: ErrCorrupt, text: "invalid distance code"},
		{name: "distance too far", src: fixed().code(a).code(b).match(fixedLitlen, fixedDist, 3, 3).bytes, want: "ab", err: ErrCorrupt, text: "a match has the distance 3, but only 2 bytes come before it"},
		{name: "distance too far, fast", src: fixed().code(a).code(b).match(fixedLitlen, fixedDist, 3, 3).raw(pad...).bytes, want: "ab", err: ErrCorrupt, text: "a match has the distance 3, but only 2 bytes come before it"},
		{name: "distance too far by one, by words", src: fixed().code(a).match(fixedLitlen, fixedDist, 9, 1).match(fixedLitlen, fixedDist, 3, 11).raw(pad...).bytes, want: "aaaaaaaaaa", err: ErrCorrupt, text: "a match has the distance 11, but only 10 bytes come before it"},
		{name: "largest distance at the start", src: fixed().match(fixedLitlen, fixedDist, 258, 32768).raw(pad...).bytes, err: ErrCorrupt, text: "a match has the distance 32768, but only 0 bytes come before it"},
		{name: "distance without code", src: new(writer).dynamic(1, withLength, []uint{0}).code(codes(withLength)['a']).code(codes(withLength)[257]).bits(0, 1).bytes, want: "a", err: ErrCorrupt, text: "invalid distance code"},
		{name: "the other distance of one", src: new(writer).dynamic(1, withLength, []uint{1}).code(codes(withLength)['a']).code(codes(withLength)[257]).bits(1, 1).raw(pad...).bytes, want: "a", err: ErrCorrupt, text: "invalid distance code"},
		{name: "the other code of one", src: new(writer).dynamic(1, lens(257, map[int]uint{256: 1}), []uint{0}).bits(1, 1).bytes, err: ErrCorrupt, text: "invalid length code"},
		{name: "one distance of two bits", src: new(writer).dynamic(1, one, []uint{2}).bytes, err: ErrCorrupt, text: "Huffman code for distances is incomplete"},
		{name: "incomplete distances", src: new(writer).dynamic(1, one, []uint{2, 2, 2}).bytes, err: ErrCorrupt, text: "Huffman code for distances is incomplete"},
		{name: "too many distances", src: new(writer).dynamic(1, one, []uint{1, 1, 1}).bytes, err: ErrCorrupt, text: "Huffman code for distances is incomplete"},
		{name: "incomplete literals", src: new(writer).dynamic(1, lens(257, map[int]uint{'a': 2, 256: 1}), []uint{0}).bytes, err: ErrCorrupt, text: "Huffman code for literals and lengths is incomplete"},
		{name: "too many literals", src: new(writer).dynamic(1, lens(257, map[int]uint{'a': 1, 'b': 1, 256: 1}), []uint{0}).bytes, err: ErrCorrupt, text: "Huffman code for literals and lengths is incomplete"},
		{name: "no end of block", src: new(writer).dynamic(1, lens(257, map[int]uint{'a': 1, 'b': 1}), []uint{0}).bytes, err: ErrCorrupt, text: "the block has no end-of-block code"},
		{name: "287 literals", src: new(writer).bits(1, 1).bits(2, 2).bits(30, 5).bits(0, 5).bits(0, 4).bytes, err: ErrCorrupt, text: "287 literal and length codes"},
		{name: "31 distances", src: new(writer).bits(1, 1).bits(2, 2).bits(0, 5).bits(30, 5).bits(0, 4).bytes, err: ErrCorrupt, text: "31 distance codes"},
		{name: "empty precode", src: new(writer).bits(1, 1).bits(2, 2).bits(0, 5).bits(0, 5).bits(0, 4).bits(0, 12).raw(pad...).bytes, err: ErrCorrupt, text: "invalid code in the list of code lengths"},
		{name: "incomplete precode", src: new(writer).bits(1, 1).bits(2, 2).bits(0, 5).bits(0, 5).bits(0, 4).bits(2, 3).bits(0, 9).raw(pad...).bytes, err: ErrCorrupt, text: "Huffman code for the code lengths is incomplete"},
		{name: "repeat of nothing", src: new(writer).bits(1, 1).bits(2, 2).bits(0, 5).bits(0, 5).bits(0, 4).bits(1, 3).bits(1, 3).bits(0, 6).bits(0, 64).bytes, err: ErrCorrupt, text: "the first code length says to repeat the previous one"},
		{name: "repeat past the end", src: new(writer).bits(1, 1).bits(2, 2).bits(0, 5).bits(0, 5).bits(0, 4).bits(0, 6).bits(1, 3).bits(1, 3).bits(0xff, 8).bits(1, 1).bits(110, 7).bits(0, 64).bytes, err: ErrCorrupt, text: "a code length is repeated 121 times, but only 120 code lengths are left"},
	} {
		t.Run(c.name, func(t *testing.T) {
			// The reference must accept the same streams.
			out, used, refErr := reference(c.src, 1<<20)
			if (refErr == nil) != (c.err == nil) || refErr == nil && string(out) != c.want {
				t.Errorf("compress/flate = %q, %v", out, refErr)
			}
			for _, room := range []int{0, 1, 300} { // the fast loop runs only with the last one
				var d Decoder
				dst := garbage(len(c.want)+room, 0xa5)
				n, consumed, err := d.Inflate(dst, c.src)
				guarded(t, dst)
				if string(dst[:n]) != c.want || !errors.Is(err, c.err) || (err != nil && !strings.Contains(err.Error(), c.text)) {
					t.Errorf("room %d: %q, %v; expected %q, %v, %q", room, dst[:n], err, c.want, c.err, c.text)
				}
				if err == nil && consumed != used || consumed > len(c.src) {
					t.Errorf("consumed %d, expected %d", consumed, used)
				}
			}
		})
	}
}

// TestMatches decodes every length at every small distance and at some large ones, at
// places where the fast loop and the careful one take over from each other.
func TestMatches(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	var distances []int
	for dist := 1; dist <= 24; dist++ {
		distances = append(distances, dist)
	}
	distances = append(distances, 257, 258, 259, 32768)
	var d Decoder
	for _, dist := range distances {
		w := new(writer).bits(1, 1).bits(1, 2)
		var want []byte
		for len(want) < dist {
			b := byte(rnd.Uint32())
			want = append(want, b)
			w.code(fixedLitlen[b])
		}
		for length := 3; length <= 258; length++ {
			for range rnd.IntN(4) {
				b := byte(rnd.Uint32())
				want = append(want, b)
				w.code(fixedLitlen[b])
			}
			w.match(fixedLitlen, fixedDist, length, dist)
			for range length {
				want = append(want, want[len(want)-dist])
			}
		}
		last := len(want)
		src := w.code(fixedLitlen[256]).bytes
		for _, more := range []int{0, 1, 7, 8, 15, 16, 17, 19, 20, 21, 300} {
			dst := garbage(last+more, byte(more))
			n, consumed, err := d.Inflate(dst, src)
			guarded(t, dst)
			if n != last || consumed != len(src) || err != nil || !bytes.Equal(dst[:n], want) {
				t.Fatalf("distance %d, room %d: %d, %d, %v, expected %d, %d; same bytes: %v", dist, more, n, consumed, err, last, len(src), bytes.Equal(dst[:n], want))
			}
		}
		// The stream is truncated at each byte of the last matches.
		for short := 1; short <= min(last, 600); short += 1 + short/16 {
			dst := garbage(last-short, byte(short))
			n, _, err := d.Inflate(dst, src)
			guarded(t, dst)
			if n != len(dst) || !errors.Is(err, ErrTooLarge) || !bytes.Equal(dst, want[:n]) {
				t.Fatalf("distance %d, %d short: %d, %v; expected the first %d bytes, %v", dist, short, n, err, len(dst), ErrTooLarge)
			}
		}
	}
}

// TestLongCodes decodes codes of every length up to 15 bits, in subtables of every
// size.
func TestLongCodes(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	random := func(n, symbols int, must int) []uint {
		for {
			// Random leaves of the tree are split until there are enough.
			leaves := []uint{0}
			for tries := 0; len(leaves) < symbols && tries < 10000; tries++ {
				i := rnd.IntN(len(leaves))
				if rnd.IntN(3) > 0 {
					i = len(leaves) - 1
				}
				if leaves[i] < 15 {
					leaves[i]++
					leaves = append(leaves, leaves[i])
				}
			}
			rnd.Shuffle(len(leaves), func(i, j int) { leaves[i], leaves[j] = leaves[j], leaves[i] })
			all := make([]uint, n)
			for i, sym := range rnd.Perm(n)[:len(leaves)] {
				all[sym] = leaves[i]
			}
			if all[must] != 0 {
				return all
			}
		}
	}
	var d Decoder
	for range 300 {
		litlen, dist := random(286, 150+rnd.IntN(137), 256), random(30, 2+rnd.IntN(29), 0)
		lc, dc := codes(litlen), codes(dist)
		w := new(writer).dynamic(1, litlen, dist)
		var want []byte
		for range 2000 {
			sym := rnd.IntN(256)
			if rnd.IntN(4) == 0 && len(want) > 0 {
				sym = 257 + rnd.IntN(29)
			}
			if litlen[sym] == 0 {
				continue
			}
			if sym < 256 {
				w.code(lc[sym])
				want = append(want, byte(sym))
				continue
			}
			ds := rnd.IntN(30)
			far := int(distSymbols[ds] >> 16)
			if dist[ds] == 0 || far > len(want) {
				continue
			}
			extra := uint(rnd.IntN(1 << litlenSymbols[sym].bits()))
			w.code(lc[sym]).bits(extra, litlenSymbols[sym].bits()).code(dc[ds]).bits(0, distSymbols[ds].bits())
			for range uint(litlenSymbols[sym]>>16) + extra {
				want = append(want, want[len(want)-far])
			}
		}
		src := w.code(lc[256]).bytes
		dst := garbage(len(want)+rnd.IntN(40), 0x5a)
		n, consumed, err := d.Inflate(dst, src)
		guarded(t, dst)
		if err != nil || consumed != len(src) || !bytes.Equal(dst[:n], want) {
			t.Fatalf("%d, %d, %v; expected %d, %d\n%v\n%v", n, consumed, err, len(want), len(src), litlen, dist)
		}
	}
}

func TestTruncated(t *testing.T) {
	g := grains(t, 8)
	var d Decoder
	for i, p := range [][]byte{g[0][:2000], g[1][:2000], g[7][20000:22000], make([]byte, 2000)} {
		for _, level := range []int{-2, 0, 1, 6, 9} {
			for _, wrap := range []bool{false, true} {
				src, decode := deflated(t, p, level), d.Inflate
				if wrap {
					src, decode = zlibbed(t, p, level), d.Zlib
				}
				for n := range src {
					dst := garbage(len(p), 0xa5)
					got, consumed, err := decode(dst, src[:n:n])
					guarded(t, dst)
					if !errors.Is(err, ErrTruncated) || consumed > n || !bytes.Equal(dst[:got], p[:got]) {
						t.Fatalf("data %d, level %d, zlib %v: first %d of %d bytes: %d, %d, %v; expected %v", i, level, wrap, n, len(src), got, consumed, err, ErrTruncated)
					}
				}
			}
		}
	}
}

// TestRoom tests that the first byte which does not fit is an error, whatever
// symbol it is part of, and that unused room is not.
func TestRoom(t *testing.T) {
	g := grains(t, 8)
	var d Decoder
	for i, p := range [][]byte{g[0][:1000], g[1][:1000], g[7][20000:21000], make([]byte, 1000)} {
		for _, level := range []int{-2, 0, 1, 6} {
			src := deflated(t, p, level)
			for room := range len(p) + 50 {
				dst := garbage(room, byte(room))
				n, consumed, err := d.Inflate(dst, src)
				guarded(t, dst)
				if room < len(p) && (n != room || !errors.Is(err, ErrTooLarge)) || room >= len(p) && (n != len(p) || consumed != len(src) || err != nil) {
					t.Fatalf("data %d, level %d: room for %d of %d: %d, %v", i, level, room, len(p), n, err)
				}
				if !bytes.Equal(dst[:n], p[:n]) {
					t.Fatalf("data %d, level %d: room for %d of %d: other bytes", i, level, room, len(p))
				}
			}
		}
	}
}

func TestZlib(t *testing.T) {
	good := zlibbed(t, []byte("hello, hello, hello"), 6)
	header := func(cmf, flg byte) []byte {
		b := slices.Clone(good)
		b[0], b[1] = cmf, flg&^31
		b[1] |= byte(31-binary.BigEndian.Uint16(b)%31) % 31
		return b
	}
	changed := func(i int) []byte {
		b := slices.Clone(good)
		b[i] ^= 1
		return b
	}
	for _, c := range []struct {
		name string
		src  []byte
		n    int
		err  error
		text string
	}{
		{name: "good", src: good, n: 19},
		{name: "small window", src: header(0x08, 0), n: 19},
		{name: "other level", src: header(0x78, 0xc0), n: 19},
		{name: "method", src: header(0x77, 0x80), err: ErrCorrupt, text: "method 7, expected 8"},
		{name: "window", src: header(0x88, 0x80), err: ErrCorrupt, text: "window size code 8, expected at most 7"},
		{name: "check", src: changed(1), err: ErrCorrupt, text: "not a multiple of 31"},
		{name: "dictionary", src: header(0x78, 0xa0), err: ErrCorrupt, text: "preset dictionary"},
		{name: "checksum, first byte", src: changed(len(good) - 4), n: 19, err: ErrCorrupt, text: "checksum"},
		{name: "checksum, last byte", src: changed(len(good) - 1), n: 19, err: ErrCorrupt, text: "checksum"},
		{name: "no checksum", src: good[:len(good)-4], n: 19, err: ErrTruncated, text: "in the checksum"},
		{name: "half a header", src: good[:1], err: ErrTruncated, text: "in the zlib header"},
		{name: "nothing", src: nil, err: ErrTruncated, text: "in the zlib header"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var d Decoder
			dst := garbage(100, 0)
			n, consumed, err := d.Zlib(dst, c.src)
			if n != c.n || !errors.Is(err, c.err) || err != nil && !strings.Contains(err.Error(), c.text) {
				t.Errorf("Zlib = %d, %v; expected %d, %v, %q", n, err, c.n, c.err, c.text)
			}
			if err == nil && consumed != len(c.src) || consumed > len(c.src) {
				t.Errorf("consumed %d of %d", consumed, len(c.src))
			}
		})
	}
}

func TestAdler32(t *testing.T) {
	p := bytes.Repeat([]byte{0xff}, 3<<20) // the largest sums in a lane
	for _, n := range []int{1 << 20, adlerPart - 1, adlerPart, adlerPart + 1, 3 << 20} {
		if got, want := adler32(p[:n]), stdadler.Checksum(p[:n]); got != want {
			t.Errorf("%d bytes of 0xff: %#08x, expected %#08x", n, got, want)
		}
	}
	rnd := rand.New(rand.NewPCG(7, 8))
	random := make([]byte, 70000)
	for i := range random {
		random[i] = byte(rnd.Uint32())
	}
	for _, p := range [][]byte{p[:70000], random} {
		for n := 0; n <= len(p); n += 1 + n/64 {
			if got, want := adler32(p[:n]), stdadler.Checksum(p[:n]); got != want {
				t.Fatalf("%d bytes: %#08x, expected %#08x", n, got, want)
			}
		}
	}
}

func TestNoAllocations(t *testing.T) {
	g := grains(t, 1)[0]
	src, dst := zlibbed(t, g, 6), make([]byte, grain)
	var d Decoder
	if n := testing.AllocsPerRun(10, func() {
		if _, _, err := d.Zlib(dst, src); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations, expected none", n)
	}
}

// TestQemuGrains decodes grains that qemu-img compressed.
func TestQemuGrains(t *testing.T) {
	peer.Need(t, "qemu-img")
	dir := t.TempDir()
	raw, vmdk := filepath.Join(dir, "raw"), filepath.Join(dir, "disk.vmdk")
	disk := slices.Concat(grains(t, 64)...)
	if err := os.WriteFile(raw, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	peer.Run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, vmdk)
	f, err := os.ReadFile(vmdk)
	if err != nil {
		t.Fatal(err)
	}
	var d Decoder
	seen := 0
	// The grains begin after the overhead, whose size is in the header at offset 64.
	// Each has its sector and its length before it, and is padded to whole sectors.
	for at := int(binary.LittleEndian.Uint64(f[64:])) * 512; at+12 <= len(f); {
		sector, size := int(binary.LittleEndian.Uint64(f[at:])), int(binary.LittleEndian.Uint32(f[at+8:]))
		if size == 0 {
			break
		}
		dst := garbage(grain, 0xa5)
		n, consumed, err := d.Zlib(dst, f[at+12:])
		if n != grain || consumed != size || err != nil || !bytes.Equal(dst, disk[sector*512:][:grain]) {
			t.Fatalf("grain at sector %d: %d, %d, %v; expected %d, %d", sector, n, consumed, err, grain, size)
		}
		at += (12 + size + 511) / 512 * 512
		seen++
	}
	if seen != 64 {
		t.Errorf("%d grains, expected 64", seen)
	}
}
