package digest_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/transfer/digest"
)

const block = digest.BlockSize

// naive computes a digest by its definition, from the whole content.
func naive(a digest.Algorithm, content []byte) string {
	if a == digest.SHA256 {
		h := sha256.Sum256(content)
		return hex.EncodeToString(h[:])
	}
	var hashes []byte
	for b := range slices.Chunk(content, 64<<10) {
		h := sha256.Sum256(b)
		hashes = append(hashes, h[:]...)
	}
	h := sha256.Sum256(binary.LittleEndian.AppendUint64(hashes, uint64(len(content))))
	return hex.EncodeToString(h[:])
}

// squares returns n bytes that do not repeat soon.
func squares(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*i>>8 ^ i)
	}
	return b
}

// TestKnownValues compares digests with values that test/blkhash.py of nirs/blkhash (May
// 2025) and sha256sum printed.
func TestKnownValues(t *testing.T) {
	xs := func(n int) []byte { return bytes.Repeat([]byte("x"), n) }
	for _, c := range []struct {
		name           string
		content        []byte
		blksum, sha256 string
	}{
		{"empty", nil, "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
		{"1 byte", xs(1), "a64a187a24c2d405b2e6e8df661f89e3107ba40c3817d284f97493b2c75ca522", "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"},
		{"64 KiB - 1", xs(65535), "22585231203ec7707e6dad9b4acee61096eba107b73c699b1ae9f62376668e92", "09ab7495d3e61a76f0deb12cb0306f0696cbb17ffc12131368c7a939f12f56d3"},
		{"64 KiB", xs(65536), "6620800c38f3fe60888dc5fe14f5a098c529715feb05a59f5cfee899ab4f2786", "1f8745f0d2d1387ec1af2211a3cf417b2e9e885e853472649c1d979d0e9370e3"},
		{"64 KiB + 1", xs(65537), "86184dff859e191917754a458e14f1565f100096a499cadb04a6b11d37196117", "1abe08ebecf1c18cab71f6fe28aaddf20268f85bad78bb9a72f88ca47c874662"},
		{"1 MiB of zeros", make([]byte, 1<<20), "3dd455346755274ce76f1c555df5e05c1cdd8da4b1c70ab7c2a6b09f51bb5ce0", "30e14955ebf1352266dc2ff8067e68104607e750abb9d3b36582b8af909fcb58"},
		{"1 zero", make([]byte, 1), "3aa275143d0713bc404144a02208ea1ea840d565fa0c19af486cc65b0a10a267", "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"},
		{"zeros, x", append(make([]byte, 1<<20), 'x'), "df296f4e5f8f8cbdb3fcea807706812f855b5a48925c52442dc5f7b7881cdba9", "3cd07772d955581e0debcca858b6d7c81da4e6c88aff072bd1953af8c500b9a6"},
		{"squares", squares(300000), "118580ef84ea45ff5a1c3e3d1ee2b94fe2dd8695ffb004f69291535f9a3e10fe", "1037c6f44c18c7465ef90cc4e68215a5f615d154d89ca531a015ff2e1d6c8425"},
	} {
		for a, want := range map[digest.Algorithm]string{digest.Blksum: c.blksum, digest.SHA256: c.sha256} {
			if got := naive(a, c.content); got != want {
				t.Errorf("%s of %s: the test's own is %s, want %s", a, c.name, got, want)
			}
			s := digest.New(a)
			s.Data(c.content)
			if got := s.Value(); got != want {
				t.Errorf("%s of %s: %s, want %s", a, c.name, got, want)
			}
			if s.Size() != int64(len(c.content)) || s.Algorithm() != a {
				t.Errorf("%s of %s: %s of %d bytes", a, c.name, s.Algorithm(), s.Size())
			}
		}
	}
}

// TestMuchZero adds a terabyte of zeros in parts of odd sizes.
func TestMuchZero(t *testing.T) {
	// The expected value is computed with crypto/sha256 alone.
	const size = 1<<40 + 12345
	zero := sha256.Sum256(make([]byte, 64<<10))
	h := sha256.New()
	many := bytes.Repeat(zero[:], 1024)
	for range size / block / 1024 {
		h.Write(many)
	}
	last := sha256.Sum256(make([]byte, 12345))
	h.Write(last[:])
	h.Write(binary.LittleEndian.AppendUint64(nil, size))
	want := hex.EncodeToString(h.Sum(nil))
	s := digest.New(digest.Blksum)
	s.Zero(1)
	s.Zero(1<<39 + 1)
	s.Zero(0)
	s.Zero(block - 2)
	s.Zero(size - s.Size())
	if got := s.Value(); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// patchy returns random content with zeros of many sizes at many alignments.
func patchy(r *rand.Rand, size int) []byte {
	b := make([]byte, size)
	for off := 0; off < size; {
		n := min(1+r.IntN(1<<(1+r.IntN(19))), size-off)
		if r.IntN(3) == 0 { // blocks
			n = min(n+block-(off+n)%block, size-off)
		}
		if r.IntN(2) == 0 {
			for i := range b[off : off+n] {
				b[off+i] = byte(r.Uint32())
			}
		}
		off += n
	}
	return b
}

// fold adds content[s.Size():end] to s, in parts and with methods that r chooses.
func fold(t *testing.T, r *rand.Rand, s *digest.Sum, content []byte, end int) {
	var pieces [2]digest.Blocks // used in turn, again and again
	for i := 0; s.Size() < int64(end); i++ {
		off := int(s.Size())
		n := min(1+r.IntN(1<<(1+r.IntN(19))), end-off)
		if r.IntN(3) == 0 {
			n = min(block-off%block, end-off)
		}
		p := content[off : off+n]
		if zeros := len(p) - len(bytes.TrimLeft(p, "\x00")); zeros > 0 && r.IntN(2) == 0 {
			if err := s.ZeroContext(t.Context(), int64(zeros)); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if r.IntN(2) == 0 {
			s.Data(p)
			continue
		}
		piece := &pieces[i%2]
		s.Algorithm().Hash(int64(off), p, piece)
		s.Blocks(piece)
	}
}

func TestAnyCutsGiveTheSame(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 60 {
		content := patchy(r, r.IntN(1<<(4+r.IntN(18))))
		for _, a := range []digest.Algorithm{digest.Blksum, digest.SHA256} {
			s := digest.New(a)
			fold(t, r, s, content, len(content))
			if got, want := s.Value(), naive(a, content); got != want {
				t.Fatalf("disk %d, %s of %d bytes: %s, want %s", i, a, len(content), got, want)
			}
		}
	}
}

// TestMarshalAnywhere checks that Value can be called at any time, and that a marshalled
// Sum continues as the original does.
func TestMarshalAnywhere(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	content := patchy(r, 2<<20+777)
	clear(content[block : 3*block+100]) // one cut is inside the zeros at the start of a block
	for _, a := range []digest.Algorithm{digest.Blksum, digest.SHA256} {
		cuts := []int{0, 1, block - 1, block, block + 1, 2 * block, 3*block + 50, 3*block + 101, len(content)}
		for range 30 {
			cuts = append(cuts, r.IntN(len(content)))
		}
		for _, cut := range cuts {
			s := digest.New(a)
			fold(t, r, s, content, cut)
			if got, want := s.Value(), naive(a, content[:cut]); got != want {
				t.Fatalf("%s of %d bytes: %s, want %s", a, cut, got, want)
			}
			state, err := s.MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			if len(state) > 512 {
				t.Errorf("a state of %d bytes", len(state))
			}
			for _, s := range []*digest.Sum{s, restored(t, state)} {
				if s.Size() != int64(cut) || s.Algorithm() != a {
					t.Errorf("%s of %d bytes became %s of %d", a, cut, s.Algorithm(), s.Size())
				}
				fold(t, r, s, content, len(content))
				if got, want := s.Value(), naive(a, content); got != want {
					t.Fatalf("%s, cut at %d: %s, want %s", a, cut, got, want)
				}
			}
		}
	}
}

func restored(t *testing.T, state []byte) *digest.Sum {
	s := digest.New(digest.SHA256) // also over another one
	s.Data([]byte("something else"))
	if err := s.UnmarshalBinary(state); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestUnmarshalBad(t *testing.T) {
	s := digest.New(digest.Blksum)
	s.Data([]byte("abc"))
	state, err := s.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	const header = len("vddkcp digest 1\n")
	changed := func(i int, b byte) []byte {
		c := bytes.Clone(state)
		c[i] = b
		return c
	}
	whole := digest.New(digest.Blksum)
	wholeState, _ := whole.MarshalBinary()
	wholeState[header+1] = 1
	for name, c := range map[string]struct {
		state []byte
		want  string
	}{
		"empty":          {nil, "unknown format or version"},
		"short":          {state[:header+9], "unknown format or version"},
		"magic":          {changed(3, 'X'), "unknown format or version"},
		"algorithm":      {changed(header, 'z'), "unknown algorithm 'z'"},
		"inner flag":     {changed(header+1, 7), "last block follows is 7, but a blksum digest of 3 bytes of data cannot have this value"},
		"negative":       {changed(header+2, 0xff), "bytes of data cannot have this value"},
		"inner of sha":   {changed(header, 's'), "bytes of data cannot have this value"},
		"inner of none":  {wholeState, "bytes of data cannot have this value"},
		"no inner":       {state[:len(state)-1], "into 2 hashes"},
		"too long":       {append(bytes.Clone(state), 0, 0), "hash"},
		"outer's magic":  {changed(header+10, 0), "hash"},
		"inner's magic":  {changed(header+10+(len(state)-header-10)/2, 0), "inner hash"},
		"no hash at all": {changed(header+1, 0)[:header+10], "hash"},
	} {
		err := new(digest.Sum).UnmarshalBinary(c.state)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", name, err, c.want)
		}
	}
}

func TestZeroEndsWithItsContext(t *testing.T) {
	cause := errors.New("stopped")
	for _, a := range []digest.Algorithm{digest.Blksum, digest.SHA256} {
		ctx, cancel := context.WithCancelCause(t.Context())
		looks := &looking{Context: ctx, atLook: 3, do: func() { cancel(cause) }}
		s := digest.New(a)
		if err := s.ZeroContext(looks, 1<<61); !errors.Is(err, cause) {
			t.Errorf("%s: error %v, want the cause", a, err)
		}
		if s.Size() == 0 || s.Size() > 1<<40 {
			t.Errorf("%s: %d bytes were folded", a, s.Size())
		}
	}
}

// looking is a context that calls do when Err is called for the atLook-th time.
type looking struct {
	context.Context
	looks, atLook int
	do            func()
}

func (l *looking) Err() error {
	if l.looks++; l.looks == l.atLook {
		l.do()
	}
	return l.Context.Err()
}

func TestBlocksOfAnotherPlace(t *testing.T) {
	var b digest.Blocks
	for name, f := range map[string]func(s *digest.Sum){
		"gap":       func(s *digest.Sum) { digest.Blksum.Hash(block, make([]byte, block), &b); s.Blocks(&b) },
		"again":     func(s *digest.Sum) { digest.Blksum.Hash(0, make([]byte, 1), &b); s.Blocks(&b); s.Blocks(&b) },
		"algorithm": func(s *digest.Sum) { digest.SHA256.Hash(0, make([]byte, 1), &b); s.Blocks(&b) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			f(digest.New(digest.Blksum))
		}()
	}
}

func TestParse(t *testing.T) {
	for _, a := range []digest.Algorithm{digest.Blksum, digest.SHA256} {
		if got, err := digest.Parse(string(a)); got != a || err != nil {
			t.Errorf("Parse(%q) = %q, %v", a, got, err)
		}
	}
	for _, s := range []string{"", "md5", "SHA256", "blksum "} {
		if _, err := digest.Parse(s); err == nil {
			t.Errorf("Parse(%q): no error", s)
		}
	}
}

func TestFoldingAllocatesNothing(t *testing.T) {
	p := squares(1 << 20)
	for _, a := range []digest.Algorithm{digest.Blksum, digest.SHA256} {
		s := digest.New(a)
		var b digest.Blocks
		a.Hash(0, p, &b)
		s.Blocks(&b)
		if n := testing.AllocsPerRun(5, func() {
			s.Data(p[:12345])
			s.Zero(54321)
			a.Hash(s.Size(), p, &b)
			s.Blocks(&b)
		}); n != 0 {
			t.Errorf("%s: %v allocations", a, n)
		}
	}
}

func BenchmarkData(b *testing.B) {
	for _, percent := range []int{0, 50, 100} {
		p := squares(1 << 20)
		for off := 0; off < len(p); off += 2 * block {
			clear(p[off+2*block*percent/100 : off+2*block])
		}
		for _, a := range []digest.Algorithm{digest.Blksum, digest.SHA256} {
			b.Run(fmt.Sprintf("%s/data=%d%%", a, percent), func(b *testing.B) {
				b.SetBytes(int64(len(p)))
				b.ReportAllocs()
				s := digest.New(a)
				for b.Loop() {
					s.Data(p)
				}
			})
		}
	}
}

func BenchmarkHash(b *testing.B) {
	p := squares(1 << 20)
	var blocks digest.Blocks
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		digest.Blksum.Hash(0, p, &blocks)
	}
}

// BenchmarkBlocks measures the work that is left for the collector.
func BenchmarkBlocks(b *testing.B) {
	p := squares(1 << 20)
	blocks := make([]digest.Blocks, 64)
	for i := range blocks {
		digest.Blksum.Hash(int64(i*len(p)), p, &blocks[i])
	}
	b.SetBytes(int64(len(blocks) * len(p)))
	b.ReportAllocs()
	for b.Loop() {
		s := digest.New(digest.Blksum)
		for i := range blocks {
			s.Blocks(&blocks[i])
		}
	}
}

func BenchmarkZero(b *testing.B) {
	for a, n := range map[digest.Algorithm]int64{digest.Blksum: 1 << 40, digest.SHA256: 1 << 28} {
		b.Run(string(a), func(b *testing.B) {
			b.SetBytes(n)
			b.ReportAllocs()
			s := digest.New(a)
			for b.Loop() {
				s.Zero(n)
			}
		})
	}
}
