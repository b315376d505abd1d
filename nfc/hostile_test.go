package nfc_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
)

// allocated returns the bytes that all goroutines allocate while f runs.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestHostileSizes meets hosts that announce sizes which nothing may allocate. The client and the host
// of the test allocate little, and the next connection works.
func TestHostileSizes(t *testing.T) {
	content := pattern(256<<10, 60)
	var kinds []nfctest.Fault
	for _, step := range nfctest.Steps() {
		for _, kind := range nfctest.Kinds(step) {
			switch kind {
			case nfctest.EndlessLine, nfctest.HugeNFCError, nfctest.HugeError, nfctest.HugeSize, nfctest.HugeDDB, nfctest.HugePacked, nfctest.Bomb:
				kinds = append(kinds, nfctest.Fault{Step: step, Kind: kind})
			}
		}
	}
	for _, f := range kinds {
		for _, compression := range nfc.Compressions {
			if f.Step != nfctest.StepRead && compression != "skipz" {
				continue
			}
			t.Run(fmt.Sprintf("%s/%v/%s", f.Step, f.Kind, compression), func(t *testing.T) {
				h, ts := newHost(t, content, nfctest.Options{Fragment: 16 << 10})
				t.Cleanup(func() { left(t, h, f.Step) })
				o, _ := faultOptions(f.Kind, compression)
				o.Trace, o.Retry.Retries = nil, 4
				d := open(t, ts, nfc.Params{Name: file, Frozen: true}, o)
				rule := h.On(f)
				if f.Kind == nfctest.Bomb { // the host makes it once
					d.ReadAt(make([]byte, 512), 0)
				}
				h.Cut()
				got := make([]byte, len(content))
				var err error
				if n := allocated(func() { _, err = d.ReadAt(got, 0) }); n > 24<<20 {
					t.Errorf("%d bytes were allocated", n)
				}
				if f.Step != nfctest.StepClose && err == nil || rule.Hits() == 0 && f.Step != nfctest.StepClose {
					t.Errorf("%d hits: %v", rule.Hits(), err)
				}
				rule.Remove()
				readAll(t, d, content, 1<<20)
				d.Close()
			})
		}
	}
}

// A hostile host answers requests as a test says.
func hostile(t *testing.T, answer func(f frame) (frames []byte)) *script {
	return newScript(t, func(s *script, conn net.Conn) error {
		if err := s.authd(conn); err != nil {
			return err
		}
		if err := s.handshake(conn); err != nil {
			return err
		}
		if unasked := answer(frame{}); unasked != nil {
			conn.Write(unasked)
		}
		for {
			f, err := readFrame(conn)
			if err != nil {
				return err
			}
			if _, err := conn.Write(answer(f)); err != nil {
				return err
			}
		}
	})
}

// hostileCases are hosts of a disk of zeros with 1 MiB. A case returns nil to answer rightly.
var hostileCases = []struct {
	name   string
	answer func(f frame) []byte
	text   string // of the error; "": none
}{
	{"right answers", func(frame) []byte { return nil }, ""},
	{"a frame before any request", func(f frame) []byte {
		if f.payload != nil {
			return nil
		}
		return frame{kind: 7, op: 7, payload: make([]byte, 44)}.bytes()
	}, "an answer to a request that waits for one, found an answer to another request"},
	{"an ERROR before any request", func(f frame) []byte {
		if f.payload != nil {
			return nil
		}
		return frame{kind: 1, op: 0xffffffff, payload: make([]byte, 16)}.bytes()
	}, "found an answer to another request, ERROR (1), opId 4294967295"},
	{"a second answer", func(f frame) []byte {
		if f.kind != 9 {
			return nil
		}
		return append(f.answer(0).bytes(), f.answer(0).bytes()...)
	}, "found an answer to another request, SET_SOCK_OPTS (9)"},
	{"a write as the answer to a read", func(f frame) []byte {
		if f.kind != 7 {
			return nil
		}
		a := f.answer(0)
		a.payload[8] = 0
		return a.bytes()
	}, "expected the direction 1"},
	{"a wrong offset", func(f frame) []byte {
		if f.kind != 7 {
			return nil
		}
		a := f.answer(0)
		a.payload[17] ^= 2
		return a.bytes()
	}, "expected the offset 0"},
	{"fragments of one byte with gaps", func(f frame) []byte {
		if f.kind != 7 {
			return nil
		}
		var b bytes.Buffer
		for place := uint32(0); place < 64<<10; place += 2 {
			b.Write(f.fragment(place, []byte{0}).bytes())
		}
		return b.Bytes()
	}, "more than 4096 separate ranges"},
	{"fragments of one byte", func(f frame) []byte { // strange, but right
		if f.kind != 7 {
			return nil
		}
		var b bytes.Buffer
		for place := range binary.LittleEndian.Uint32(f.payload[32:]) {
			b.Write(f.fragment(place, []byte{0}).bytes())
		}
		return b.Bytes()
	}, ""},
	{"a fragment at the end of the numbers", func(f frame) []byte {
		if f.kind != 7 {
			return nil
		}
		return f.fragment(0xfffffe00, make([]byte, 512)).bytes()
	}, "found bytes [4294966784, 4294967296)"},
	{"no capacity", capacity(0), "at least 512"},
	{"half a sector", capacity(512 + 256), "a disk of 768 bytes"},
	{"a negative capacity", capacity(1 << 63), "at most 2^60 bytes"},
	{"a huge capacity", capacity(1<<60 + 512), "at most 2^60 bytes"},
	{"a long text of an error", func(f frame) []byte {
		if f.kind != 22 {
			return nil
		}
		p := make([]byte, 16)
		p[0] = 77
		binary.LittleEndian.PutUint32(p[12:], 64<<10)
		return frame{kind: 1, op: f.op, payload: p, extra: bytes.Repeat([]byte{0x1b}, 64<<10)}.bytes()
	}, "the host reports error 77"},
	{"a long entry of the descriptor", func(f frame) []byte {
		if f.kind != 11 {
			return nil
		}
		a := f.answer(0)
		binary.LittleEndian.PutUint32(a.payload[12:], 64<<10+1)
		return a.bytes()
	}, "an entry of the disk's descriptor of at most 65536 bytes"},
	{"noise", func(f frame) []byte {
		if f.kind != 4 {
			return nil
		}
		b := make([]byte, 100<<10)
		r := rand.New(rand.NewPCG(1, 1))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}, "a frame that begins with the number"},
}

// capacity answers OPEN_FILE with a capacity.
func capacity(n uint64) func(f frame) []byte {
	return func(f frame) []byte {
		if f.kind != 4 {
			return nil
		}
		return f.answer(n).bytes()
	}
}

// TestHostileAnswers meets hosts whose frames are wrong in other ways than nfctest.Host can make them.
func TestHostileAnswers(t *testing.T) {
	for _, c := range hostileCases {
		t.Run(c.name, func(t *testing.T) {
			s := hostile(t, func(f frame) []byte {
				b := c.answer(f)
				if b == nil && f.payload != nil {
					b = f.answer(1 << 20).bytes()
				}
				return b
			})
			o := quick()
			o.Clear, o.Compression, o.Timeout = true, "none", 20*time.Second
			var err error
			n := allocated(func() {
				d, openErr := nfc.Open(t.Context(), nfc.Params{Name: file}, s, o)
				if err = openErr; err == nil {
					_, err = d.ReadAt(make([]byte, 64<<10), 0)
					d.Close()
				}
			})
			if n > 64<<20 { // most of it is for what the host sends
				t.Errorf("%d bytes were allocated", n)
			}
			if (err == nil) != (c.text == "") || err != nil && !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v", err)
			}
			if left := goroutines(); left != "" {
				t.Errorf("left open:\n%s", left)
			}
		})
	}
}

// TestBadFragmentsAreNotGivenOut answers a read with the right bytes in fragments of which the last
// one is wrong. No call returns bytes of the failed connection, and the memory of a call that has
// failed is not written afterwards.
func TestBadFragmentsAreNotGivenOut(t *testing.T) {
	content := bytes.Repeat([]byte{1}, 1<<20)
	for _, kind := range []nfctest.Kind{nfctest.WrongOffset, nfctest.Overlap, nfctest.Beyond, nfctest.WrongMagic, nfctest.ShortZlib, nfctest.SkipZLength} {
		t.Run(kind.String(), func(t *testing.T) {
			h, ts := newHost(t, content, nfctest.Options{Fragment: 64 << 10})
			noLeaks(t, h)
			d := open(t, ts, nfc.Params{Name: file}, nfc.Options{Compression: map[bool]string{true: "zlib"}[kind == nfctest.ShortZlib]})
			h.On(nfctest.Fault{Step: nfctest.StepRead, Kind: kind, Fragment: 15})
			p := make([]byte, 1<<20)
			n, err := d.ReadAt(p, 0)
			if err == nil || n != 0 || errors.Is(err, io.EOF) {
				t.Errorf("%d bytes, %v", n, err)
			}
			clear(p) // the race detector finds a write of the connection
			d.Close()
			if !bytes.Equal(p, make([]byte, 1<<20)) {
				t.Error("the memory of a failed call was written")
			}
		})
	}
}
