package wire

var requestFields = map[FrameType][]field{
	OpenSession: {{name: "buffer bytes", at: 4}, {name: "buffer count", at: 8}},
	OpenFile:    {{name: "path length", at: 0}, {name: "kind", at: 16}, {name: "flags", at: 20, hex: true}},
	CloseFile:   {{name: "handle", at: 0, wide: true, hex: true}},
	DDBGet:      {{name: "handle", at: 0, wide: true, hex: true}, {name: "key length", at: 8}},
	SetResPool:  {{name: "pool", at: 0}},
	IO: {
		{name: "handle", at: 0, wide: true, hex: true}, {name: "direction", at: 8}, {name: "compression", at: 12},
		{name: "offset", at: 16, wide: true}, {name: "length", at: 24, wide: true},
		{name: "length again", at: 32}, {name: "length again", at: 36},
	},
}

var answerFields = map[FrameType][]field{
	Error: {{name: "code", at: 0, wide: true}, {name: "text length", at: 12}},
	OpenFile: {
		{name: "status", at: 0, wide: true}, {name: "handle", at: 8, wide: true, hex: true}, {name: "kind", at: 16},
		{name: "flags", at: 20, hex: true}, {name: "capacity", at: 28, wide: true}, {name: "sector size", at: 36},
		{name: "cylinders", at: 40}, {name: "heads", at: 44}, {name: "sectors", at: 48},
	},
	SetSockOpts: {{name: "send buffer", at: 0}, {name: "receive buffer", at: 4}, {name: "flag", at: 8}},
	DDBGet:      {{name: "text length", at: 12}},
	IO: {
		{name: "status", at: 0, wide: true}, {name: "direction", at: 8}, {name: "compression", at: 12},
		{name: "offset", at: 16, wide: true}, {name: "length", at: 24}, {name: "fragment at", at: 28},
		{name: "fragment length", at: 32}, {name: "bytes that follow", at: 36},
	},
}

// RequestFields returns the fields of the payload of a request in words, and the bytes without a
// known meaning that are not zero. The payload may have any size.
func RequestFields(t FrameType, payload []byte) string { return describe(payload, 0, requestFields[t]) }

// AnswerFields returns the same as RequestFields, for the payload of an answer.
func AnswerFields(t FrameType, payload []byte) string { return describe(payload, 0, answerFields[t]) }
