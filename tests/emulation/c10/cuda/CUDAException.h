#pragma once  // device.cpp defines what is needed
