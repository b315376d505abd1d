package pacing

import "testing"

func TestPace(t *testing.T) {
	p := NewPace(1<<20, 4)
	l, asked := p.Next()
	if l != (Limits{1 << 20, 4}) {
		t.Fatal(l)
	}
	for range 4 { // were on the way together
		if !p.Denied(asked) {
			t.Fatal("nothing less was left")
		}
	}
	if l, asked = p.Next(); l != (Limits{512 << 10, 3}) {
		t.Fatalf("after one refusal %+v", l)
	}
	for p.Denied(asked) {
		l, asked = p.Next()
	}
	if l != (Limits{64 << 10, 1}) {
		t.Errorf("the least is %+v", l)
	}
	n := 0
	for ; l.Size < 1<<20 || l.Depth < 4; n++ {
		p.Served()
		if now, _ := p.Next(); now.Size > l.Size+64<<10 || now.Depth > l.Depth+1 || now.Size < l.Size {
			t.Fatalf("%+v after %+v", now, l)
		} else {
			l = now
		}
	}
	if n < 100 || n > 2000 {
		t.Errorf("%d requests to recover", n)
	}
	p.Served()
	if l, _ = p.Next(); l != (Limits{1 << 20, 4}) {
		t.Errorf("%+v", l)
	}
	if small := NewPace(4096, 1); small.Denied(0) {
		t.Error("less than the least")
	}
}
