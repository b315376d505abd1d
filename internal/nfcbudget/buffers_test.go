package nfcbudget

import "testing"

func TestHalved(t *testing.T) {
	b, n := Buffers{24 * 64 << 10, 4}, 0
	for ; ; n++ {
		smaller, ok := b.Halved()
		if !ok {
			break
		}
		if smaller.Bytes() >= b.Bytes() || smaller.Size%(64<<10) != 0 || smaller.Count < 1 {
			t.Fatalf("%+v after %+v", smaller, b)
		}
		b = smaller
	}
	if b != (Buffers{64 << 10, 1}) || n != 6 {
		t.Errorf("%+v after %d", b, n)
	}
}
