package qcow2

import (
	"errors"
	"fmt"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"github.com/vddkcp/vddkcp/sink"
)

// Compression is how clusters are compressed.
type Compression string

const (
	None Compression = "none" // "" means the same
	Zlib Compression = "zlib" // raw deflate, that every reader of the format knows
	Zstd Compression = "zstd" // qemu reads it from 5.1 on
)

// Levels are those that a compression has, from fast to small, and the one that
// 0 stands for. All are 0 where there is nothing to choose.
func Levels(c Compression) (least, most, usual int) {
	switch c {
	case Zlib:
		return 1, 9, 3
	case Zstd:
		return 1, 22, 3
	}
	return 0, 0, 0
}

// encoding finds out whether clusters differ from the backing, and compresses
// them, reusing its memory.
type encoding struct {
	cluster int
	overlay *overlay // nil: there is no backing
	deflate *flate.Writer
	zstd    *zstd.Encoder
	out     bounded
	whole   []byte // the last cluster, where the disk ends in it
}

func newEncoding(o Options) (*encoding, error) {
	e := &encoding{cluster: int(o.ClusterSize)}
	if o.Backing != nil {
		e.overlay = &overlay{backing: o.Backing, name: o.BackingName}
	}
	var err error
	switch o.Compression {
	case None:
	case Zlib:
		e.deflate, err = flate.NewWriter(&e.out, o.Level)
	case Zstd:
		e.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(o.Level)),
			zstd.WithEncoderCRC(false), zstd.WithWindowSize(max(e.cluster, zstd.MinWindowSize)), zstd.WithLowerEncoderMem(true),
			// It takes no more time, and 0.6% off what a real file system takes.
			zstd.WithAllLitEntropyCompression(true))
	default:
		err = fmt.Errorf("compression %q has no encoding", o.Compression)
	}
	return e, err
}

// Encode implements sink.Encoding.
func (e *encoding) Encode(dst, unit []byte, off int64) (enc []byte, plain bool, err error) {
	if len(unit) == 0 || len(unit) > e.cluster {
		return dst, false, fmt.Errorf("encode %d bytes: a cluster has %d", len(unit), e.cluster)
	}
	if e.overlay != nil {
		if same, err := e.overlay.has(unit, off); same || err != nil {
			return dst, false, err
		}
	}
	if e.zstd == nil && e.deflate == nil {
		return dst, true, nil
	}
	data := unit
	if len(unit) < e.cluster {
		if e.whole == nil {
			e.whole = make([]byte, e.cluster)
		}
		clear(e.whole[copy(e.whole, unit):])
		data = e.whole
	}
	if e.zstd != nil {
		enc = e.zstd.EncodeAll(data, dst)
		if len(enc)-len(dst) >= e.cluster {
			return enc[:len(dst)], true, nil
		}
		return enc, false, nil
	}
	e.out = bounded{dst, len(dst) + e.cluster - 1}
	e.deflate.Reset(&e.out)
	if _, err = e.deflate.Write(data); err == nil {
		err = e.deflate.Close()
	}
	enc, e.out.p = e.out.p, nil
	if err == errFull {
		return enc[:len(dst)], true, nil
	}
	return enc, false, err
}

// bounded is a writer that appends up to a length.
type bounded struct {
	p   []byte
	end int
}

var errFull = errors.New("it does not shrink")

func (b *bounded) Write(p []byte) (int, error) {
	if len(b.p)+len(p) > b.end {
		return 0, errFull
	}
	b.p = append(b.p, p...)
	return len(p), nil
}

// NewEncoding implements sink.Encoder. It is nil where clusters are stored as
// they are.
func (d *disk) NewEncoding() sink.Encoding {
	if !d.o.encodes() {
		return nil
	}
	e, err := newEncoding(d.o)
	if err != nil {
		return failing{err}
	}
	return e
}

// encodes says whether clusters may be anything but stored as they are.
func (o Options) encodes() bool { return o.Compression != None || o.Backing != nil }

type failing struct{ err error }

func (f failing) Encode(dst, _ []byte, _ int64) ([]byte, bool, error) { return dst, false, f.err }
