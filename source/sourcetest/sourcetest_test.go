package sourcetest_test

import (
	"context"
	"errors"
	"io"
	"iter"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// faulty is a disk that violates the contract in one way.
type faulty struct {
	*sourcetest.Memory
	fault    string
	ctx      context.Context
	uncached bool
	buffers  [][]byte
}

// faults are the violations, each with the test of the suite that must detect it.
var faults = map[string]string{
	"size":              "Size",
	"wrong byte":        "ReadWhole",
	"short at border":   "ReadBorders",
	"no EOF":            "ReadEnd",
	"EOF of another":    "ReadEnd",
	"shared buffer":     "ReadConcurrently",
	"past the buffer":   "ReadWhole",
	"negative":          "ReadEnd",
	"gap":               "Extents",
	"ends early":        "Extents",
	"past the end":      "ExtentsOfPart",
	"zero is data":      "Extents",
	"absent data":       "Extents",
	"part differs":      "ExtentsOfPart",
	"goes on":           "ExtentsBreak",
	"outside":           "ExtentsOutside",
	"ends at Close":     "ExtentsClose",
	"other cause":       "Context",
	"extents go on":     "ContextOfExtents",
	"reads after Close": "Close",
	"lists after Close": "Close",
	"other identity":    "Identified",
	"other proof":       "Identified",
	"no format":         "Described",
	"other place":       "InFile",
	"buffer goes":       "Allocator",
	"uncached differs":  "Uncached",
}

// TestSuiteFinds runs the suite on each faulty disk. Because the suite has to fail, it
// runs in a process of its own.
func TestSuiteFinds(t *testing.T) {
	run := func(fault, test string) (output string, err error) {
		cmd := exec.Command(os.Args[0], "-test.run=^TestFaulty$/"+test)
		cmd.Env = append(os.Environ(), faultVariable+"="+fault)
		b, err := cmd.CombinedOutput()
		return string(b), err
	}
	if output, err := run("none", ""); err != nil {
		t.Fatalf("a disk without a fault: %v\n%s", err, output)
	}
	for fault, test := range faults {
		t.Run(fault, func(t *testing.T) {
			t.Parallel()
			output, err := run(fault, "^"+test+"$")
			if err == nil || !strings.Contains(output, "--- FAIL: TestFaulty/"+test+" ") {
				t.Errorf("%v, want %s to fail; got\n%s", err, test, output)
			}
		})
	}
}

const faultVariable = "VDDKCP_TEST_FAULT"

func TestFaulty(t *testing.T) {
	fault := os.Getenv(faultVariable)
	if fault == "" {
		t.Skip("TestSuiteFinds runs it")
	}
	content, extents := sample()
	sourcetest.Run(t, sourcetest.Config{
		Content: content,
		Open: func(ctx context.Context, t testing.TB) source.Disk {
			return &faulty{
				Memory: &sourcetest.Memory{Context: ctx, Bytes: content, ExtentList: extents, ID: "faulty"},
				fault:  fault,
				ctx:    ctx,
			}
		},
	})
}

func (f *faulty) is(fault string) bool { return f.fault == fault }

func (f *faulty) Size() int64 {
	if f.is("size") {
		return f.Memory.Size() &^ 511
	}
	return f.Memory.Size()
}

var shared [128 << 10]byte

func (f *faulty) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.Memory.ReadAt(p, off)
	switch {
	case f.is("wrong byte") && off <= 262_144 && 262_144 < off+int64(n), f.is("uncached differs") && f.uncached && n > 0:
		p[n-1]++
	case f.is("short at border") && off%65536 == 65535 && n > 1:
		n = 1
	case f.is("no EOF") && err == io.EOF:
		err = nil
	case f.is("EOF of another") && off > f.Size():
		err = io.ErrUnexpectedEOF
	case f.is("past the buffer") && cap(p) > len(p):
		p[:cap(p)][len(p)] = 0
	case f.is("negative") && off < 0:
		err = nil
	case f.is("other cause") && errors.Is(err, context.Cause(f.ctx)):
		err = errors.New("read failed")
	case f.is("reads after Close") && errors.Is(err, os.ErrClosed):
		n, err = len(p), nil
	case f.is("shared buffer") && n <= len(shared):
		copy(shared[:], p[:n])
		runtime.Gosched()
		copy(p[:n], shared[:])
	}
	return n, err
}

func (f *faulty) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		for e, err := range f.Memory.Extents(ctx, off, length) {
			switch {
			case f.is("gap") && e.Off == 135_536, f.is("outside") && off == f.Size() && err != nil,
				(f.is("lists after Close") || f.is("ends at Close")) && errors.Is(err, os.ErrClosed):
				continue
			case f.is("ends early") && e.End() == f.Size():
				return
			case f.is("past the end") && off > 0 && e.End() == off+length:
				e.Len++
			case f.is("zero is data") && e.Off == 0:
				e.Kind = source.Zero
			case f.is("absent data") && e.Off == 0:
				e.Absent = true
			case f.is("part differs") && length < 1000:
				e.Depth++
			case f.is("extents go on") && err != nil && ctx.Err() != nil:
				return
			}
			if !yield(e, err) && !f.is("goes on") {
				return
			}
		}
	}
}

func (f *faulty) Identity(ctx context.Context) (id, proof string, err error) {
	switch {
	case f.is("other identity"):
		f.ID += "x"
	case f.is("other proof"):
		f.Proof = "certain"
	}
	return f.Memory.Identity(ctx)
}

func (f *faulty) Info() source.Info {
	if f.is("no format") {
		return source.Info{}
	}
	return f.Memory.Info()
}

func (f *faulty) InFile(off int64) (*os.File, int64, int64, bool) {
	if !f.is("other place") || off < 0 || off >= f.Size() {
		return nil, 0, 0, false
	}
	file, err := os.Open(os.Args[0])
	if err != nil {
		panic(err)
	}
	return file, off, 1, true
}

func (f *faulty) Buffer(_ context.Context, n int) ([]byte, func(), error) {
	b := make([]byte, n)
	if f.is("buffer goes") {
		f.buffers = append(f.buffers, b)
	}
	return b, func() {}, nil
}

func (f *faulty) ReadUncached() { f.uncached = true }

func (f *faulty) Close() error {
	for _, b := range f.buffers {
		clear(b)
	}
	return f.Memory.Close()
}
