package worker

// functions are the functions of the library that the worker can call, in the order of
// VDDK_FUNCTIONS in program/vddk.h.
var functions = []struct {
	name     string
	required bool
}{
	{"InitEx", true},
	{"Exit", true},
	{"GetErrorText", true},
	{"FreeErrorText", true},
	{"AllocateConnectParams", false},
	{"FreeConnectParams", false},
	{"ConnectEx", true},
	{"Disconnect", true},
	{"Open", true},
	{"Close", true},
	{"GetInfo", true},
	{"FreeInfo", true},
	{"GetTransportMode", false},
	{"ListTransportModes", false},
	{"Read", true},
	{"Write", false},
	{"ReadAsync", false},
	{"WriteAsync", false},
	{"Wait", false},
	{"Flush", false},
	{"QueryAllocatedBlocks", false},
	{"FreeBlockList", false},
	{"PrepareForAccess", false},
	{"EndAccess", false},
	{"Cleanup", false},
	{"ReadMetadata", false},
	{"GetMetadataKeys", false},
	{"Create", false},
	{"CheckRepair", false},
}

const functionPrefix = "VixDiskLib_"

// Functions returns the functions of the library that a worker looks for. Present is false in
// all of them.
func Functions() []Function { return listFunctions(0) }

// listFunctions returns the functions. Bit i of present says that function i is present.
func listFunctions(present uint64) []Function {
	list := make([]Function, len(functions))
	for i, f := range functions {
		list[i] = Function{Name: functionPrefix + f.name, Required: f.required, Present: present>>i&1 == 1}
	}
	return list
}

// hasFunction reports whether present has the bit of the function with the given full name.
func hasFunction(present uint64, name string) bool {
	for i, f := range functions {
		if functionPrefix+f.name == name {
			return present>>i&1 == 1
		}
	}
	return false
}

// missingFunctions returns the names of the required functions whose bits are not set in present.
func missingFunctions(present uint64) []string {
	var missing []string
	for _, f := range listFunctions(present) {
		if f.Required && !f.Present {
			missing = append(missing, f.Name)
		}
	}
	return missing
}
