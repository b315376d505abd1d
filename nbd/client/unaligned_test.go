package client

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/sink"
)

// memory answers requests like a server that exports content with a minimum block size. Holds
// compares the content.
func memory(t *testing.T, content []byte, block uint32) (answer func(nbd.Request, []byte) []byte, holds func(want []byte) bool) {
	var mu sync.Mutex
	holds = func(want []byte) bool {
		mu.Lock()
		defer mu.Unlock()
		return bytes.Equal(content, want)
	}
	return func(r nbd.Request, data []byte) []byte {
		mu.Lock()
		defer mu.Unlock()
		end := r.Off + uint64(r.Len)
		if r.Off%uint64(block) != 0 || end%uint64(block) != 0 && end != uint64(len(content)) || end > uint64(len(content)) {
			t.Errorf("%v of %d bytes at %d: not whole blocks of %d", r.Type, r.Len, r.Off, block)
			return done(r, nbd.EINVAL)
		}
		switch p := content[r.Off:end]; r.Type {
		case nbd.CmdRead:
			return to(r, chunk(nbd.ChunkData, true, r.Off, p))
		case nbd.CmdWrite:
			copy(p, data)
		case nbd.CmdWriteZeroes:
			clear(p)
		}
		return done(r, 0)
	}, holds
}

// TestUnaligned reads and writes with any alignment at a server that requires whole blocks. The
// last block is short.
func TestUnaligned(t *testing.T) {
	const block, size = 4096, 10*4096 + 777
	content := make([]byte, size)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range content {
		content[i] = byte(r.Uint32())
	}
	want := bytes.Clone(content)
	answer, holds := memory(t, content, block)
	s := play(t, greetingOf(size, nbd.SendWriteZeroes, nbd.BlockSizes{Min: block, Preferred: block, Max: 2 * block}), answer)
	d := plainTarget(s.server)
	defer d.Abort()
	edges := []int64{0, 1, 511, block - 1, block, block + 1, 3*block + 5, 8 * block, 10 * block, 10*block + 1, size - 1, size}
	for _, from := range edges {
		for _, to := range edges {
			if from >= to {
				continue
			}
			p := bytes.Repeat([]byte{byte(r.Uint32())}, int(to-from))
			if r.IntN(3) == 0 {
				clear(p)
				if err := d.zero(t.Context(), from, to-from, false); err != nil {
					t.Fatal(err)
				}
			} else if err := s.write(p, from); err != nil {
				t.Fatal(err)
			}
			copy(want[from:], p)
			got := make([]byte, to-from)
			if err := s.read(got, from); err != nil || !bytes.Equal(got, p) {
				t.Fatalf("[%d, %d) reads otherwise than written: %v", from, to, err)
			}
			if !holds(want) {
				t.Fatalf("a write of [%d, %d) changed other bytes", from, to)
			}
		}
	}
}

// Concurrent writes to parts of the same block must not undo each other.
func TestUnalignedAtOnce(t *testing.T) {
	const block, size, piece = 4096, 4 * 4096, 512
	content := make([]byte, size)
	answer, holds := memory(t, content, block)
	s := play(t, greetingOf(size, 0, nbd.BlockSizes{Min: block, Preferred: block, Max: block}), answer)
	defer s.close()
	var all sync.WaitGroup
	for off := int64(0); off < size; off += piece {
		all.Go(func() {
			if err := s.write(bytes.Repeat([]byte{byte(off/piece) + 1}, piece), off); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(i/piece) + 1
	}
	if !holds(want) {
		t.Error("a write is undone by another")
	}
}

// A copy must resume where it stopped, even inside a block of the server.
func TestResumeInsideBlock(t *testing.T) {
	const block, size = 4096, 4 * 4096
	content := bytes.Repeat([]byte{1}, size)
	answer, holds := memory(t, content, block)
	s := play(t, greetingOf(size, 0, nbd.BlockSizes{Min: block, Preferred: block, Max: block}), answer)
	d := newTarget(s.server, size, SinkOptions{Options: sink.Options{State: state(size), Resume: 1536}})
	defer d.Abort()
	if _, err := d.WriteAt(data(block-1536), 1536); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{1}, size)
	copy(want[1536:], data(block-1536))
	if !holds(want) {
		t.Error("other bytes than those written")
	}
	if _, err := d.WriteAt(data(block), 1537); err == nil {
		t.Error("a write at 1537 is no error")
	}
}
