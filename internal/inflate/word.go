package inflate

const isPair entry = 1 << 6

func (d *Decoder) pair() {
	t := d.litlen[:1<<litlenBits]
	for i := len(t) - 1; i >= 0; i-- {
		e := t[i]
		if e&isLiteral == 0 {
			continue
		}
		n := e & 15
		e2 := t[i>>n]
		if e2&isLiteral != 0 && n+e2&15 <= litlenBits {
			t[i] = e&^63 | (n + e2&15) | isPair | e2>>16<<24
		}
	}
}
