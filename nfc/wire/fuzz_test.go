package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/fuzzseed"
)

// The function lines returns strings as seeds.
func lines(texts ...string) (seeds [][]byte) {
	for _, text := range texts {
		seeds = append(seeds, []byte(text))
	}
	return seeds
}

// hexes returns seeds that are written in hexadecimal.
func hexes(f *testing.F, digits ...string) (seeds [][]byte) {
	for _, d := range digits {
		seeds = append(seeds, unhex(f, d))
	}
	return seeds
}

// FuzzBanner checks that a banner is accepted only with the code 220, and that its version consists
// of digits and dots.
func FuzzBanner(f *testing.F) {
	fuzzseed.Add(f, lines(realBanner, "220 VMware Authentication Daemon Version 1.0, ServerDaemonProtocol:SOAP, MKSDisplayProtocol:VNC",
		"220 Version 1.10", "220 Version .", "220", "220 ", "220-a", "2200", "", "530 Please login with USER and PASS", "\x16\x03\x03\x00\x02\x02\x28",
		"220 SSL Required, NFCSSL supported, SHA256 supported", "220 \xff\x00\x01", "220 a\r", "220 "+strings.Repeat("a", 2100))...)
	f.Fuzz(func(t *testing.T, b []byte) {
		line := string(b)
		got, err := ParseBanner(line)
		if err != nil {
			checkError(t, err, "expected ")
			return
		}
		if !strings.HasPrefix(line, "220") || len(line) > MaxLine || got.Text != line || strings.ContainsAny(line, "\r\n") {
			t.Errorf("%q was accepted as %+v", line, got)
		}
		if strings.Trim(got.Version, "0123456789.") != "" {
			t.Errorf("the version is %q", got.Version)
		}
	})
}

// FuzzReply checks that a reply that is accepted consists of its code and its text.
func FuzzReply(f *testing.F) {
	fuzzseed.Add(f, lines("200 Connect ha-nfc", "200 Connect ha-nfcssl", "200 "+sampleSum, "200 "+strings.ToLower(sampleSum), "530 Please login with USER and PASS",
		"501 Invalid arguments", "200", "099", "1000 x", "200  x ", "-20 x", "0x1 x", "200 "+sampleSum[:92], "200\x00", "")...)
	f.Fuzz(func(t *testing.T, b []byte) {
		line := string(b)
		got, err := ParseReply(line)
		if err != nil {
			checkError(t, err, "expected ")
			return
		}
		rest, ok := strings.CutPrefix(line, fmt.Sprint(got.Code))
		if !ok || got.Code < 100 || got.Code > 999 || rest != "" && rest[0] != ' ' || strings.TrimSpace(rest) != got.Text {
			t.Errorf("%q was accepted as %+v", line, got)
		}
		sum, err := ParseSHA256(got.Text)
		if err == nil {
			if text := strings.ReplaceAll(fmt.Sprintf("% X", sum), " ", ":"); text != strings.ToUpper(got.Text) {
				t.Errorf("%q: got %s", got.Text, text)
			}
		}
	})
}

// FuzzMessage checks that Fields changes if bytes that are not zero change, except the bytes of a
// token, and that the lengths of texts are limited. Missing bytes are zero.
func FuzzMessage(f *testing.F) {
	last := NewHello()
	last[263] = 1
	seeds := hexes(f, "24000000 00000000 00000000 00000000 01000000", "14000000 01000000 02000000 10000000", "14000000 01000000 02000000 01000100",
		"33000000 0b000000", "2b000000 506c61696e54657874 0041", "2b000000", "ffffffff ffffffff", "")
	for _, m := range []*Message{NewClientRandom("PlainText"), NewHello(), NewVersion(11, 0), NewClientName("vddk", "nbdmode"), NewFeatures(3), NewFrames(), NewSessionComplete(), last} {
		seeds = append(seeds, m[:])
	}
	fuzzseed.Add(f, seeds...)
	f.Fuzz(func(t *testing.T, b []byte) {
		m := new(Message)
		copy(m[:], b)
		text := m.Fields()
		if !strings.HasPrefix(text, m.Type().String()) {
			t.Errorf("type %d: got %q", m.Type(), text)
		}
		if _, _, n, err := m.ServerError(); n < 0 || n > MaxText || err != nil && n != 0 {
			t.Errorf("a text of %d bytes, %v", n, err)
		}
		m.HasFrames()
		m.ServerVersion()
		other := *m
		for i := 4; i < len(other); i++ {
			if other[i] != 0 {
				other[i] = other[i]%255 + 1
			}
		}
		if shown := other.Fields() != text; shown != (m.Type() != ClientRandom && other != *m) {
			t.Errorf("type %v: %q shows the bytes: %v", m.Type(), text, shown)
		}
	})
}

// FuzzHeader decodes a header, and describes the bytes after it as the payload of the frame.
func FuzzHeader(f *testing.F) {
	var seeds [][]byte
	for i, r := range []Request{NewOpenSession(1<<20, 4), NewSockOpts(), NewResPool(), NewOpenFile("[ds] a/a.vmdk", ReadDisk), NewDDBGet(1<<63, "uuid"), NewCloseFile(7, false), NewCloseFile(7, true), NewCloseSession(false), NewCloseSession(true)} {
		seeds = append(seeds, r.Append(nil, uint32(i)))
	}
	seeds = append(seeds, Read{Handle: 1, Off: 512, Len: 512}.Append(nil, 1<<31))
	seeds = append(seeds, hexes(f, "7ada00a1 01000000 10000000 03000000 0b00000000000000 00000000 05000000 7761697400", "7ada00a1 ffffffff ffffffff ffffffff", "a100da7a 01000000 00000000 00000000", "")...)
	fuzzseed.Add(f, seeds...)
	f.Fuzz(func(t *testing.T, b []byte) {
		var head [HeaderSize]byte
		payload := b[copy(head[:], b):]
		h, err := ParseHeader(&head)
		if err != nil {
			checkError(t, err, "expected a frame that begins with the number 0xa100da7a")
		} else if got := h.Append(nil); !bytes.Equal(got, head[:]) {
			t.Errorf("got % x, want % x", got, head)
		}
		kind := FrameType(u32(head[:], 4))
		size, fixed := PayloadSize(kind)
		if err := (Header{Type: kind, Size: u32(head[:], 8)}).CheckSize(size); fixed && (err == nil) != (int64(u32(head[:], 8)) == int64(size)) {
			t.Errorf("%v: got %v", h, err)
		}
		for _, text := range []string{RequestFields(kind, payload), AnswerFields(kind, payload)} {
			if len(text) > 1000 {
				t.Errorf("the description has %d bytes: %s", len(text), text)
			}
		}
	})
}

// FuzzOpenFile decodes 60 bytes as the answer to OPEN_FILE. Missing bytes are zero.
func FuzzOpenFile(f *testing.F) {
	const handle = "8877665544332281 02000000 1e000000 00000000"
	const rest = "00020000 0a000000 0b000000 0c000000"
	fuzzseed.Add(f, hexes(f,
		"0000000000000000"+handle+"0000000001000000"+rest, "0000000000000000"+handle+"0002000000000000"+rest,
		"0000000000000000"+handle+"0000000000000010"+rest, "0000000000000000"+handle+"0002000000000010"+rest,
		"0000000000000000"+handle+"0000000000000000"+rest, "0000000000000000"+handle+"0100000000000000"+rest,
		"0000000000000000"+handle+"00feffffffffffff"+rest, "0000000000000000"+handle+"0000000000000080"+rest,
		"0b00000000000000"+handle+"0000000001000000"+rest, "0000000000000080"+handle+"ffffffffffffffff"+rest,
		"", "ffffffffffffffff ffffffffffffffff")...)
	f.Fuzz(func(t *testing.T, b []byte) {
		var p [OpenFileSize]byte
		copy(p[:], b)
		got, err := ParseOpenFile(&p)
		capacity := binary.LittleEndian.Uint64(p[28:])
		valid := got.Status != 0 || capacity >= 512 && capacity <= 1<<60 && capacity%512 == 0
		switch {
		case err != nil:
			checkError(t, err, "expected a disk of")
			if valid := binary.LittleEndian.Uint64(p[:]) != 0; valid || got != (OpenedFile{}) {
				t.Errorf("got %+v, %v", got, err)
			}
		case !valid, got.Status == 0 && uint64(got.Capacity) != capacity, got.Status != 0 && got.Capacity != 0:
			t.Errorf("% x was accepted as %+v", p, got)
		case got.Handle != binary.LittleEndian.Uint64(p[8:]):
			t.Errorf("got the handle %#x", got.Handle)
		}
	})
}

// FuzzDDB decodes the payloads of answers that announce a text.
func FuzzDDB(f *testing.F) {
	const handle = "8877665544332281"
	fuzzseed.Add(f, hexes(f,
		handle+"04000000 00000000", handle+"04000000 24000000", handle+"04000000 00000100", handle+"04000000 01000100", handle+"04000000 ffffffff",
		handle+"04000000 000000", handle+"04000000 00000000 00", "", "00", "0b00000000000000 00000000 05000000", "0b00000000000000 01000000 05000000",
		"ffffffffffffffff ffffffff 00000080")...)
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := ParseDDBGet(b)
		if err != nil {
			checkError(t, err, "expected ")
		}
		want := 0
		valid := len(b) == 16 && binary.LittleEndian.Uint32(b[12:]) <= MaxText
		if valid {
			want = int(binary.LittleEndian.Uint32(b[12:]))
		}
		if (err == nil) != valid || n != want {
			t.Errorf("got %d, %v, want %d", n, err, want)
		}
		if len(b) != FailureSize {
			return
		}
		failure, err := ParseFailure((*[FailureSize]byte)(b))
		if (err == nil) != valid || failure.TextSize != want || failure.Code != binary.LittleEndian.Uint64(b) {
			t.Errorf("got %+v, %v, want a text of %d bytes", failure, err, want)
		}
	})
}

// FuzzFragment decodes the first 44 bytes as a fragment of the answer to a read. The next bytes
// describe the read: offset, length, compression, and size of the buffers.
func FuzzFragment(f *testing.F) {
	read := "0010000000000000 00001000 03000000 00000100"
	fragment := func(change func(f *Fragment)) []byte {
		p := Fragment{Compression: SkipZ, Off: 4096, RequestLen: 1 << 20, Place: 65536, Len: 65536, Packed: 8, Direction: 1}
		change(&p)
		return append(encodeFragment(p), unhex(f, read)...)
	}
	fuzzseed.Add(f, append(hexes(f, "", "ffffffffffffffff ffffffffffffffff ffffffffffffffff ffffffffffffffff ffffffffffffffff"),
		fragment(func(f *Fragment) {}),
		fragment(func(f *Fragment) { f.Compression, f.Packed = Plain, 65536 }),
		fragment(func(f *Fragment) { f.Compression = FastLZ }),
		fragment(func(f *Fragment) { f.Status = 11 }),
		fragment(func(f *Fragment) { f.Off++ }),
		fragment(func(f *Fragment) { f.Place = 1 << 20 }),
		fragment(func(f *Fragment) { f.Place = 1<<32 - 1 }),
		fragment(func(f *Fragment) { f.Len = 0 }),
		fragment(func(f *Fragment) { f.Len = 65537 }),
		fragment(func(f *Fragment) { f.Packed = 0 }),
		fragment(func(f *Fragment) { f.Packed = 1<<17 + 1 }),
		fragment(func(f *Fragment) { f.Direction = 0 }),
	)...)
	f.Fuzz(func(t *testing.T, b []byte) {
		var all [ReadSize + 20]byte
		copy(all[:], b)
		p := [ReadSize]byte(all[:])
		params := all[ReadSize:]
		r := Read{Off: int64(u64(params, 0) >> 1), Len: int(u32(params, 8) % (MaxRead + 1)), Compression: Compression(u32(params, 12) % 4)}
		buffer := int64(u32(params, 16) % (2<<20 + 1))
		got := ParseFragment(&p)
		if encoded := encodeFragment(got); !bytes.Equal(encoded[:40], p[:40]) {
			t.Fatalf("got % x, want % x", encoded, p)
		}
		if text := got.Fields(); !strings.Contains(text, got.Compression.String()) {
			t.Errorf("got %q", text)
		}
		from, to := int64(got.Place), int64(got.Place)+int64(got.Len)
		valid := got.Direction == 1 && got.Off == r.Off && int64(got.RequestLen) == int64(r.Len) && from < to && to <= int64(r.Len) && to-from <= buffer
		if got.Compression == Plain {
			valid = valid && got.Packed == got.Len
		} else {
			valid = valid && got.Compression == r.Compression && got.Packed > 0 && int64(got.Packed) <= buffer+65536
		}
		err := got.Check(r, int(buffer))
		if (err == nil) != valid {
			t.Errorf("%s, read %+v, buffer %d: got %v, want an error: %v", got.Fields(), r, buffer, err, !valid)
		}
		if err != nil {
			checkError(t, err, "in an answer to the read of")
		}
	})
}

// naiveSkipZ decodes skipz data one byte at a time. It returns nil if the data are not valid.
func naiveSkipZ(size int, src []byte) []byte {
	next := func() uint64 {
		var v uint64
		for i := range 4 {
			v |= uint64(src[i]) << (8 * i)
		}
		src = src[4:]
		return v
	}
	if len(src) < 8 || next() != uint64(size) || next() != 0 {
		return nil
	}
	dst := make([]byte, 0, size)
	for len(src) > 0 {
		if len(src) < 8 {
			return nil
		}
		off, n := next(), next()
		if off < uint64(len(dst)) || n == 0 || n > uint64(len(src)) {
			return nil
		}
		for ; n > 0; n-- {
			for uint64(len(dst)) < off && len(dst) < size {
				dst = append(dst, 0)
			}
			if len(dst) == size {
				return nil
			}
			dst, src, off = append(dst, src[0]), src[1:], off+1
		}
	}
	return append(dst, make([]byte, size-len(dst))...)
}

// FuzzSkipZ compares DecodeSkipZ with a naive decoder. It also checks that no byte outside of the
// destination is changed.
func FuzzSkipZ(f *testing.F) {
	long := make([]byte, 4096)
	copy(long[1000:], "abc")
	long[4095] = 1
	fuzzseed.Add(f, append(hexes(f,
		"10000000 00000000 02000000 03000000 010203 05000000 01000000 04 0e000000 02000000 0506",
		"10000000 00000000", "10000000 01000000", "ffffffff 00000000", "00000000 00000000", "", "10000000",
		"10000000 00000000 00000000 00000000", "10000000 00000000 10000000 01000000 01", "10000000 00000000 ffffffff ffffffff 01",
		"10000000 00000000 02000000 02000000 0101 03000000 01000000 02", "10000000 00000000 02000000 03000000 0101",
		"04000000 00000000 00000000 04000000 01020304"), encodeSkipZ(long, 8), encodeSkipZ(bytes.Repeat([]byte{1}, 512), 8))...)
	f.Fuzz(func(t *testing.T, src []byte) {
		size := 512
		if len(src) >= 4 && u32(src, 0) <= 1<<16 {
			size = int(u32(src, 0))
		}
		const guard = 16
		all := bytes.Repeat([]byte{0xee}, guard+size+guard)
		edge := bytes.Repeat([]byte{0xee}, guard)
		got := all[guard : guard+size]
		err := DecodeSkipZ(got, slices.Clone(src))
		want := naiveSkipZ(size, src)
		if err != nil {
			checkError(t, err, "skipz")
		}
		if (err == nil) != (want != nil) || err == nil && !bytes.Equal(got, want) {
			t.Errorf("got % x, %v, want % x", got, err, want)
		}
		if !bytes.Equal(all[:guard], edge) || !bytes.Equal(all[guard+size:], edge) {
			t.Error("bytes outside of the destination were changed")
		}
	})
}
