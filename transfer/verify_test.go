package transfer_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// blksum computes the digest by the definition of nirs/blkhash.
func blksum(b []byte) string {
	outer := sha256.New()
	for rest := b; len(rest) > 0; {
		n := min(len(rest), 64<<10)
		h := sha256.Sum256(rest[:n])
		outer.Write(h[:])
		rest = rest[n:]
	}
	outer.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(b))))
	return fmt.Sprintf("%x", outer.Sum(nil))
}

// TestCopyDigest checks that the digests of a copy do not depend on how it is cut
// into pieces.
func TestCopyDigest(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for i := range 12 {
		src := randomDisk(r, 3<<20+int64(r.IntN(100_000)), 1)
		o := transfer.Options{RequestSize: []int{4 << 10, 100 << 10, 1 << 20}[i%3], KeepZeros: i%2 == 1}
		for algorithm, want := range map[digest.Algorithm]string{
			digest.Blksum: blksum(src.Bytes),
			digest.SHA256: fmt.Sprintf("%x", sha256.Sum256(src.Bytes)),
		} {
			o.Digest, o.Verify = algorithm, true
			dst := &sinktest.Memory{Unit: []int64{1, 64 << 10}[i/6], Parallel: i % 4, Zeroed: i%3 == 0}
			result, err := transfer.Copy(t.Context(), src, create(t, dst, src.Size(), sink.Options{}), plan(t, src), o)
			if err != nil {
				t.Fatal(err)
			}
			ended(t, dst)
			if got := *result.Digest; got != (report.Digest{Algorithm: string(algorithm), Value: want}) || result.Verify.Status != report.VerifyOK {
				t.Errorf("disk %d: %v, verify %v, want %s %s", i, got, result.Verify, algorithm, want)
			}
			result, err = transfer.CopyStream(t.Context(), bytes.NewReader(src.Bytes), sink.UnknownSize, create(t, dst, sink.UnknownSize, sink.Options{}), o)
			if err != nil || result.Digest.Value != want || result.Verify.Status != report.VerifyOK {
				t.Errorf("disk %d as a stream: %+v, %v", i, result, err)
			}
		}
	}
}

// TestDigestOfBacking checks that the digest of an overlay includes the content of
// its backing.
func TestDigestOfBacking(t *testing.T) {
	backing := &sourcetest.Memory{Bytes: bytes.Repeat([]byte("backing"), 300<<10/7)}
	src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{0xEE}, 512<<10), ExtentList: []source.Extent{
		{Off: 0, Len: 448 << 10, Kind: source.Inherited},
		{Off: 448 << 10, Len: 64 << 10},
	}}
	want := make([]byte, 512<<10)
	copy(want, backing.Bytes)
	copy(want[448<<10:], src.Bytes[448<<10:])
	dst := &sinktest.Memory{Unit: 64 << 10, Zeroed: true}
	result, err := transfer.Copy(t.Context(), src, create(t, dst, src.Size(), sink.Options{Backing: backing}), plan(t, src), transfer.Options{Backing: backing, Verify: true, RequestSize: 64 << 10})
	if err != nil || result.Digest.Value != blksum(want) || result.Verify.Status != report.VerifyOK {
		t.Errorf("%+v, %v", result, err)
	}
}

// liar is a target that reads back other bytes than were written.
type liar struct {
	sink.Disk
	change func([]byte)
	err    error
}

func (l liar) Reopen(ctx context.Context) (source.Disk, error) {
	if l.err != nil {
		return nil, l.err
	}
	v, _ := sink.Ability[sink.Verifiable](l.Disk)
	d, err := v.Reopen(ctx)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		return nil, err
	}
	l.change(b)
	return &sourcetest.Memory{Bytes: b}, nil
}

func TestVerifyFindsWhatWasLost(t *testing.T) {
	for _, c := range []struct {
		name      string
		change    func([]byte)
		message   string
		different int64
	}{
		{"a bit", func(b []byte) { b[1_234_567] ^= 4 }, "first difference at byte 1234567: source 0x", 1},
		{"a lost write", func(b []byte) { clear(b[1<<20 : 2<<20]) }, "first difference at byte 1048576: source 0x", -1},
		{"data in a hole", func(b []byte) { b[len(b)-1] = 7 }, "source 0x00, target 0x07; 1 ranges, 1 bytes", 1},
	} {
		src := sourcetest.Pattern(3<<20, source.Extent{Len: 2 << 20})
		dst := &sinktest.Memory{Zeroed: true}
		counters := new(progress.Counters)
		result, err := transfer.Copy(t.Context(), src, liar{create(t, dst, src.Size(), sink.Options{}), c.change, nil}, plan(t, src), transfer.Options{Verify: true, Counters: counters})
		var mismatch *transfer.MismatchError
		if !errors.As(err, &mismatch) || !strings.Contains(err.Error(), c.message) {
			t.Errorf("%s: error %v", c.name, err)
			continue
		}
		v := result.Verify
		if v.Status != report.VerifyMismatch || c.different > 0 && v.Different != c.different || v.Different < 1 {
			t.Errorf("%s: %+v", c.name, v)
		}
		if _, ok := dst.Published(); ok {
			t.Errorf("%s: published", c.name)
		}
		if got := dst.Leftovers(); len(got) != 1 {
			t.Errorf("%s: the evidence was not kept", c.name)
		}
		if result.Counts.Read != 2<<20 {
			t.Errorf("%s: the copy read %d bytes", c.name, result.Counts.Read)
		}
		ended(t, dst)
	}
}

func TestVerifyOfStream(t *testing.T) {
	b := bytes.Repeat([]byte{1}, 100_000)
	dst := &sinktest.Memory{}
	_, err := transfer.CopyStream(t.Context(), bytes.NewReader(b), int64(len(b)), liar{create(t, dst, int64(len(b)), sink.Options{}), func(b []byte) { b[5]++ }, nil}, transfer.Options{Verify: true})
	var mismatch *transfer.MismatchError
	if !errors.As(err, &mismatch) || mismatch.Want != blksum(b) {
		t.Errorf("error %v", err)
	}
}

// fickle is a source whose first read returns a wrong byte.
type fickle struct {
	*sourcetest.Memory
	reads int
}

func (f *fickle) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.Memory.ReadAt(p, off)
	if f.reads++; f.reads == 1 {
		p[100] ^= 1
	}
	return n, err
}

// TestVerifyWithoutADifference checks the error if only the first reading of the
// source was wrong.
func TestVerifyWithoutADifference(t *testing.T) {
	src := &fickle{Memory: sourcetest.Pattern(1<<20, source.Extent{Len: 1 << 20})}
	dst := &sinktest.Memory{}
	_, err := transfer.Copy(t.Context(), src, liar{create(t, dst, src.Size(), sink.Options{}), func(b []byte) { b[100] ^= 1 }, nil}, plan(t, src), transfer.Options{Verify: true})
	if err == nil || !strings.Contains(err.Error(), "both were equal when they were read again") {
		t.Errorf("error %v", err)
	}
}

func TestVerifyFails(t *testing.T) {
	src := sourcetest.Pattern(1<<20, source.Extent{Len: 1 << 20})
	dst := &sinktest.Memory{}
	_, err := transfer.Copy(t.Context(), src, liar{create(t, dst, src.Size(), sink.Options{}), nil, errBoom}, plan(t, src), transfer.Options{Verify: true})
	if !errors.Is(err, errBoom) {
		t.Errorf("error %v", err)
	}
	if _, ok := dst.Published(); ok || len(dst.Leftovers()) > 0 {
		t.Error("published, or left")
	}
	// The embedding hides the ability sink.Verifiable.
	_, err = transfer.Copy(t.Context(), src, struct{ sink.Disk }{create(t, dst, src.Size(), sink.Options{})}, plan(t, src), transfer.Options{Verify: true})
	if !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("error %v", err)
	}
}

// TestDifferenceOfAnOverlay checks that the first difference is also found in a range
// that an overlay leaves to its backing.
func TestDifferenceOfAnOverlay(t *testing.T) {
	backing := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 512<<10)}
	src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{0xEE}, 512<<10), ExtentList: []source.Extent{
		{Off: 0, Len: 448 << 10, Kind: source.Inherited}, {Off: 448 << 10, Len: 64 << 10},
	}}
	dst := liar{create(t, &sinktest.Memory{}, src.Size(), sink.Options{Backing: backing}), func(b []byte) { b[5] = 2 }, nil}
	_, err := transfer.Copy(t.Context(), src, dst, plan(t, src), transfer.Options{Backing: backing, Verify: true})
	if err == nil || !strings.Contains(err.Error(), "first difference at byte 5: source 0x01, target 0x02; 1 ranges, 1 bytes") {
		t.Errorf("error %v", err)
	}
}
