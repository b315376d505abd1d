package sinktest

import (
	"errors"
	"fmt"

	"github.com/vddkcp/vddkcp/sink"
)

// encoder is a memoryDisk that is also a sink.Encoder. Units whose first byte is
// even are stored as they are, and all other units are encoded. Tests can
// therefore produce units of both kinds. The encoded form of a unit differs from
// the unit in every byte and in its length.
type encoder struct{ *memoryDisk }

const codeMark = 0x5A

// WriteAt always fails, because callers must pass data to Place.
func (e encoder) WriteAt(p []byte, off int64) (int, error) {
	e.m.mu.Lock()
	defer e.m.mu.Unlock()
	return 0, e.violate(Call{OpWrite, off, int64(len(p))}, "not encoded")
}

func (e encoder) NewEncoding() sink.Encoding { return encoding{} }

func (e encoder) Place(off int64, enc []byte, plain bool) error {
	unit := enc
	if !plain {
		if len(enc) < 2 || enc[0] != codeMark {
			return fmt.Errorf("memory: %d bytes without a valid encoding were placed at offset %d", len(enc), off)
		}
		unit = make([]byte, len(enc)-1)
		for i, b := range enc[1:] {
			unit[i] = ^b
		}
	}
	if want := min(e.unit, e.size-off); int64(len(unit)) != want {
		return fmt.Errorf("memory: a unit of %d bytes was placed at offset %d: want %d bytes", len(unit), off, want)
	}
	_, err := e.memoryDisk.WriteAt(unit, off)
	return err
}

type encoding struct{}

func (encoding) Encode(dst, unit []byte, _ int64) (enc []byte, plain bool, err error) {
	if len(unit) == 0 {
		return dst, false, errors.New("memory: an empty unit")
	}
	if unit[0]&1 == 0 {
		return dst, true, nil
	}
	dst = append(dst, codeMark)
	for _, b := range unit {
		dst = append(dst, ^b)
	}
	return dst, false, nil
}
