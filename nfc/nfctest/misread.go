package nfctest

// refuses reports whether the request of a rule has no effect.
func (r *Rule) refuses() bool {
	switch r.Kind {
	case EndOfSession, NFCError, HugeNFCError, ErrorAlone, ErrorThenZeros, ErrorTwice, NoMemory, HugeError, Status:
		return true
	}
	return false
}

// alter returns the bytes that a host with the given fault sends in place of an answer, a frame or
// the first fragment of a read of n bytes. The rule may be nil.
func alter(r *Rule, b []byte, n int64) []byte {
	if r == nil {
		return b
	}
	kind, size, op := le.Uint32(b[4:]), int(le.Uint32(b[8:])), le.Uint32(b[12:])
	zeros := newFrame(kind, op, make([]byte, size), nil)
	refusal := newError(op, r.Code, r.Text)
	switch r.Kind {
	case EndOfSession, NFCError, HugeNFCError:
		return inPlace(r)
	case ErrorAlone:
		return refusal
	case ErrorThenZeros:
		return append(refusal, zeros...)
	case ErrorThenData:
		return append(refusal, b...)
	case ErrorTwice:
		return append(append(refusal, zeros...), zeros...)
	case NoMemory:
		return append(newError(op, codeMemory, memoryText(n)), zeros...)
	case HugeError:
		le.PutUint32(refusal[headSize+12:], 0xffffffff)
		return refusal
	case WrongMagic:
		le.PutUint32(b, magic+1)
	case WrongType:
		le.PutUint32(b[4:], 99)
	case WrongSize:
		le.PutUint32(b[8:], uint32(size+4))
	case HugeSize:
		le.PutUint32(b[8:], 0xffffffff)
	case WrongOpID:
		le.PutUint32(b[12:], op+1000)
	case Status:
		if kind != frameIO {
			le.PutUint64(zeros[headSize:], r.Code)
			return zeros
		}
		b = b[:fragmentHead]
		le.PutUint64(b[headSize:], r.Code)
		le.PutUint32(b[48:], 0)
		le.PutUint32(b[52:], 0)
	case HugeDDB:
		le.PutUint32(b[headSize+12:], 0xffffffff)
	}
	if kind == frameIO {
		alterFragment(r.Kind, b)
	}
	return b
}

// alterFragment changes the head of a fragment.
func alterFragment(k Kind, b []byte) {
	length, n := le.Uint32(b[40:]), le.Uint32(b[48:])
	switch k {
	case WrongOffset:
		le.PutUint64(b[32:], le.Uint64(b[32:])+sectorSize)
	case WrongLength:
		le.PutUint32(b[40:], length+sectorSize)
	case Beyond:
		le.PutUint32(b[44:], length-n+sectorSize)
	case WrongPacked:
		le.PutUint32(b[52:], le.Uint32(b[52:])+16)
	case HugePacked:
		le.PutUint32(b[52:], 0xffffffff)
	}
}

// misread answers a read as a rule says.
func (w *worker) misread(r *Rule, q *read) {
	target := min(max(r.Fragment, 0), q.parts()-1)
	for i := range q.parts() {
		if i != target {
			w.part(q, i)
			continue
		}
		place := int64(i) * q.fragment
		n := min(q.fragment, q.answered-place)
		more := w.misbuilt(r, q, place, n)
		if r.refuses() {
			q.left.Store(1) // no other fragment follows
		}
		w.sent(q)
		for _, b := range more {
			if w.c.strike(r, w.c.out, b) != nil {
				return
			}
		}
		if r.refuses() {
			return
		}
	}
}

// misbuilt returns the pieces that are sent in place of a fragment.
func (w *worker) misbuilt(r *Rule, q *read, place, n int64) [][]byte {
	if b := misform(r.Kind, q, place, n); b != nil {
		return [][]byte{b}
	}
	copied := func(place, n int64) []byte {
		b, err := w.build(q, place, n)
		if err != nil {
			return newError(q.op, codeInvalid, err.Error())
		}
		return append([]byte(nil), b...)
	}
	switch r.Kind {
	case Missing:
		return nil
	case Twice:
		b := copied(place, n)
		return [][]byte{b, b}
	case Overlap:
		return [][]byte{copied(place, n/2+1), copied(place+n/2, n-n/2)}
	case ZeroLength:
		empty := make([]byte, fragmentHead)
		putHead(empty, q, plain, place, 0)
		return [][]byte{empty, copied(place, n)}
	}
	return [][]byte{alter(r, copied(place, n), q.length)}
}

// misform returns a fragment whose data are not in the form that its head says; nil: the kind is
// about something else.
func misform(k Kind, q *read, place, n int64) []byte {
	var data []byte
	numbers := func(list ...int64) {
		for _, i := range list {
			data = le.AppendUint32(data, uint32(i))
		}
	}
	text := func(n int) { data = append(data, "0123456789abcdef"[:n]...) }
	kind := uint32(withSkipZ)
	switch k {
	case WrongCompression:
		if q.compression == withSkipZ {
			kind = withZlib
		}
		data = make([]byte, n)
	case BrokenZlib:
		kind, data = withZlib, []byte{0x78, 0x9c, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	case ShortZlib:
		kind, data = withZlib, zlibZeros(n-1)
	case Bomb:
		if numbers(0xfffffe00, 0); q.compression != withSkipZ {
			kind, data = withZlib, bomb()
		}
	case SkipZDescending:
		numbers(n, 0, n/2, 4)
		text(4)
		numbers(0, 4)
		text(4)
	case SkipZOverlap:
		numbers(n, 0, 0, 16)
		text(16)
		numbers(8, 16)
		text(16)
	case SkipZBeyond:
		numbers(n, 0, n-4, 8)
		text(8)
	case SkipZShort:
		numbers(n, 0, 0, 64)
		text(10)
	case SkipZCut:
		numbers(n, 0, 16)
	case SkipZHead:
		numbers(n)
	case SkipZLength:
		numbers(n+sectorSize, 0)
	case SkipZSecond:
		numbers(n, 1)
	default:
		return nil
	}
	b := append(make([]byte, fragmentHead, fragmentHead+len(data)), data...)
	putHead(b, q, kind, place, n)
	return b
}
