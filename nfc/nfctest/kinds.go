package nfctest

import "fmt"

var kindNames = [lastKind]string{
	Nothing:          "Nothing",
	Drop:             "Drop",
	Reset:            "Reset",
	Silence:          "Silence",
	Cut:              "Cut",
	Stall:            "Stall",
	Line:             "Line",
	EndlessLine:      "EndlessLine",
	WrongThumbprint:  "WrongThumbprint",
	CloseNotify:      "CloseNotify",
	OtherCertificate: "OtherCertificate",
	Number:           "Number",
	EndOfSession:     "EndOfSession",
	NFCError:         "NFCError",
	HugeNFCError:     "HugeNFCError",
	WrongType:        "WrongType",
	ErrorAlone:       "ErrorAlone",
	ErrorThenZeros:   "ErrorThenZeros",
	ErrorThenData:    "ErrorThenData",
	ErrorTwice:       "ErrorTwice",
	NoMemory:         "NoMemory",
	HugeError:        "HugeError",
	WrongMagic:       "WrongMagic",
	WrongOpID:        "WrongOpID",
	WrongSize:        "WrongSize",
	HugeSize:         "HugeSize",
	Status:           "Status",
	HugeDDB:          "HugeDDB",
	WrongOffset:      "WrongOffset",
	WrongLength:      "WrongLength",
	Overlap:          "Overlap",
	Twice:            "Twice",
	Beyond:           "Beyond",
	ZeroLength:       "ZeroLength",
	WrongPacked:      "WrongPacked",
	HugePacked:       "HugePacked",
	WrongCompression: "WrongCompression",
	Missing:          "Missing",
	BrokenZlib:       "BrokenZlib",
	ShortZlib:        "ShortZlib",
	Bomb:             "Bomb",
	SkipZDescending:  "SkipZDescending",
	SkipZOverlap:     "SkipZOverlap",
	SkipZBeyond:      "SkipZBeyond",
	SkipZShort:       "SkipZShort",
	SkipZCut:         "SkipZCut",
	SkipZHead:        "SkipZHead",
	SkipZLength:      "SkipZLength",
	SkipZSecond:      "SkipZSecond",
}

// String returns the name of the kind, for tests.
func (k Kind) String() string {
	if k < 0 || k >= lastKind {
		return fmt.Sprintf("unknown kind %d", int(k))
	}
	return kindNames[k]
}

// Steps returns all steps, in the order in which they happen.
func Steps() []Step {
	return []Step{
		StepConnect, StepBanner, StepTLS, StepSession, StepThumbprint, StepProxy, StepSecondTLS,
		StepHandshake36, StepHandshake51, StepHandshake52, StepOpenSession, StepSocketOptions,
		StepResourcePool, StepOpenFile, StepDDB, StepRead, StepClose,
	}
}

// Kinds returns the kinds of faults that are possible at a step, except Nothing.
func Kinds(s Step) []Kind {
	var kinds []Kind
	for k := Nothing + 1; k < lastKind; k++ {
		if possible(s, k) {
			kinds = append(kinds, k)
		}
	}
	return kinds
}
