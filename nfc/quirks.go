package nfc

// Quirks change details of the protocol that are uncertain. They are for people who find out why a
// host refuses a connection, and are no settings for daily use. The zero value changes nothing.
type Quirks struct {
	text     string
	maxDepth int
	maxRead  int
}

// ParseQuirks parses a list such as "token=plaintext,ack=wait". docs/guide/nfc.md lists the keys.
func ParseQuirks(text string) (Quirks, error) {
	if text != "" {
		return Quirks{}, errNotYet
	}
	return Quirks{text: text}, nil
}

// String returns the list in the form that ParseQuirks accepts. It is "" for the zero value.
func (q Quirks) String() string { return q.text }
