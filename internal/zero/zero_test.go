package zero

import "testing"

func TestIs(t *testing.T) {
	for n := range 70 {
		b := make([]byte, n)
		if !Is(b) {
			t.Errorf("Is(%d zeros) = false", n)
		}
		for i := range b {
			b[i] = 1
			if Is(b) {
				t.Errorf("Is(%d bytes, one at %d) = true", n, i)
			}
			b[i] = 0
		}
	}
}

func BenchmarkIs(b *testing.B) {
	block := make([]byte, 4096)
	b.SetBytes(int64(len(block)))
	b.ReportAllocs()
	for b.Loop() {
		if !Is(block) {
			b.Fatal("not zero")
		}
	}
}
